"""Which steps a manager keeps and which it removes, in the background, beside forks, other managers and files of others."""

from __future__ import annotations

import _thread
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import shardsave
from shardsave._common.os_calls import CallFailed
from shardsave._runs import recorded, remover
from shardsave._storage import removal
from support import forked, holds_in_child
from training_run import INDEX, manager_of, model, path_of, steps_in, train, value_of_step

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks


def test_own_policy(memory: Path) -> None:
    """Catches a function of the user that is not asked, or that gets other steps than the committed ones."""
    seen: list[list[int]] = []

    def odd(steps: tuple[shardsave.StepInfo, ...]) -> list[int]:
        seen.append([info.step for info in steps])
        return [info.step for info in steps if info.step % 20]

    with manager_of(memory, policy=odd) as manager:
        for step in range(1, 61):
            manager.step(step, model(step))
            manager.wait_removed()
    assert steps_in(memory) == [10, 30, 50, 60] and seen[-1] == [10, 30, 50, 60]


@pytest.mark.parametrize("chosen", [None, 3, [None], ["10"], [True], [1.0]], ids=repr)
def test_own_policy_returns_nonsense(memory: Path, chosen: Any) -> None:
    """Catches a step that goes because of what a function returned that is no list of steps, and an error that does not name it."""
    with manager_of(memory, policy=lambda steps: chosen) as manager:
        with pytest.raises(TypeError, match=r"policy must return .*; no step was removed"):
            manager.save(10, model(10))
        with pytest.raises(TypeError, match="policy must return"):
            manager.save(20, model(20))
    assert steps_in(memory) == [10, 20]


def test_own_policy_returns_what_it_got(memory: Path) -> None:
    """Catches a function that returns steps as it got them, and is refused."""
    with manager_of(memory, policy=lambda steps: steps[:1]) as manager:
        train(manager, 1, 30)
    assert steps_in(memory) == [10, 30]


def test_foreign_files_stay(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches the removal of a file that no save wrote, and one that stays without being named."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        (path_of(memory, 10) / "notes.txt").write_text("mine")
        (path_of(memory, 10) / "model-00009-of-00009.safetensors").write_text("mine")
        train(manager, 11, 30)
    assert sorted(os.listdir(path_of(memory, 10))) == ["model-00009-of-00009.safetensors", "notes.txt"]
    removed = {facts["step"]: facts["leftovers"] for facts in records("step removed")}
    assert removed == {10: ("model-00009-of-00009.safetensors", "notes.txt"), 20: ()}
    assert manager.latest().step == 30  # type: ignore[union-attr]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_without_the_metric(
    memory: Path, records: Callable[[str], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    """Catches a best step that is never kept, since its metric has another name, and nobody says so."""
    with manager_of(memory, keep_best=("loss", "min", 1), asynchronous=asynchronous) as manager:
        reports = [manager.save(step, model(step), metrics={name: 1.0}) for step, name in ((10, "Loss"), (20, "loss"))]
        reports += [manager.save(30, model(30)), manager.save(40, model(40), metrics={"loss": float("nan")})]
        notes = [(pending.wait() if asynchronous else pending).notes for pending in reports]
    said = ["step 10 has no metric 'loss', only 'Loss'", "step 30 has no metric 'loss'", "step 40 has NaN as 'loss'"]
    said = [f"{words}: keep_best does not count it" for words in said]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == said
    assert notes == [(said[0],), (), (said[1],), (said[2],)]
    assert [facts["step"] for facts in records("metric missing")] == [10, 30, 40]


def test_another_process_removes_what_is_kept(
    memory: Path, records: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a record of a call that failed, without a word of the other process, and a step that is removed although what was to stay is
    gone."""
    make_durable = remover.make_durable

    def after_another(run: Any, step: int) -> None:
        shutil.rmtree(run.path_of(20))
        make_durable(run, step)

    monkeypatch.setattr(remover, "make_durable", after_another)
    with manager_of(memory, keep_last=2, durable=False) as manager:
        train(manager, 1, 30)
    (facts,) = records("removal failed")
    assert facts["problem"] == (
        f"cannot make {path_of(memory, 20)} durable: another process has removed it meanwhile, one process was expected to remove steps of "
        f"{memory}; this one removed none"
    )
    assert steps_in(memory) == [10, 30]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EEXIST])
def test_another_process_records_its_policy(
    memory: Path, records: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Catches a warning about a file that another manager of the run was replacing at that moment, and a policy that is never recorded."""
    replace, failures = recorded._replace, iter([CallFailed("rename", recorded.RECORD_NAME, number, os.strerror(number))])

    def meet_another(folder: Any, content: bytes) -> None:
        for failure in failures:
            raise failure
        replace(folder, content)

    monkeypatch.setattr(recorded, "_replace", meet_another)
    with manager_of(memory, keep_last=2) as manager:
        train(manager, 1, 10)
        assert recorded.read_policy(str(memory)) is None
        train(manager, 11, 20)
    assert recorded.read_policy(str(memory)) is not None and not records("policy not recorded")


def test_the_size_of_what_was_removed(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches a size of a removed step without its training state, which may be most of it; in the log record, and in `clean`."""
    training = {"average": torch.zeros(250_000)}
    with manager_of(memory, keep_last=1) as manager:
        manager.save(10, model(10), training=training)
        (size,) = (info.bytes for info in manager.steps())
        manager.save(20, model(20), training=training)
    (facts,) = records("step removed")
    assert facts["bytes"] >= size > 1_000_000
    with patch.object(removal, "finish_removal", side_effect=[removal.RemovedCheckpoint(), SystemExit]):
        with manager_of(memory, keep_last=1) as manager:
            manager.save(30, model(30), training=training)
    (leaving,) = shardsave.clean(memory, remove=False).found
    assert leaving.bytes >= size and any("/training-" in file and file.endswith(".tensors") for file in leaving.files)


def test_a_step_that_is_a_link(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches the removal of what a symbolic link leads to: a step that someone has moved elsewhere."""
    train(manager_of(memory / "run"), 1, 20)
    path_of(memory / "run", 10).rename(memory / "archive")
    path_of(memory / "run", 10).symlink_to(memory / "archive")
    with manager_of(memory / "run", keep_last=1) as manager:
        manager.save(30, model(30))
    assert value_of_step(memory / "run", 10) == 10 and "it is a symbolic link" in records("removal failed")[0]["problem"]
    assert steps_in(memory / "run") == [10, 30]


def test_other_directories_stay(memory: Path) -> None:
    """Catches a step of an index that shardsave did not write being counted or removed, and names that are no step."""
    foreign = path_of(memory, 5)
    foreign.mkdir()
    (foreign / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    (foreign / "model-00001-of-00001.safetensors").write_text("x")
    (memory / "step-00000007").write_text("a file")
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 20)
        assert [(info.step, info.state) for info in manager.steps() if info.step < 10] == [(5, "foreign")]
    assert sorted(os.listdir(foreign)) == ["model-00001-of-00001.safetensors", INDEX] and (memory / "step-00000007").exists()


def test_without_a_thread(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches steps that stay, or a save that fails after its commit, because no thread can be started."""
    manager = manager_of(memory, keep_last=1)
    train(manager, 1, 10)

    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    manager.save(20, model(20))
    assert steps_in(memory) == [20] and manager.wait_removed(0)


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Halts removals until the value of this fixture is called."""
    go_on = threading.Event()
    remove = remover.remove_step
    monkeypatch.setattr(remover, "remove_step", lambda run, step: (go_on.wait(60), remove(run, step))[1])
    yield go_on.set
    go_on.set()


def test_a_forked_child(memory: Path, halted: Callable[[], None]) -> None:
    """Catches a child that waits for its parent's thread, or keeps its parent's lock."""
    manager = manager_of(memory, keep_last=1)
    train(manager, 1, 20)
    assert not manager.wait_removed(0)
    assert holds_in_child(lambda: manager.wait_removed(0))
    child = forked(manager.close)
    assert os.waitpid(child, 0)[1] == 0
    halted()
    assert manager.wait_removed(10) and steps_in(memory) == [20]


def test_a_step_that_is_saved_again_while_it_is_removed(memory: Path, halted: Callable[[], None]) -> None:
    """Catches a save into a directory that a thread is about to remove."""
    manager = manager_of(memory, keep_best=("loss", "min", 1))
    manager.save(10, model(1), metrics={"loss": 5})
    manager.save(20, model(2), metrics={"loss": 1})
    manager._keeper.uncounted[20] = "damaged"
    timer = threading.Timer(0.3, halted)
    timer.start()
    manager.save(10, model(3), metrics={"loss": 0})
    timer.join()
    manager.close()
    assert value_of_step(memory, 10) == 3


def test_without_hard_links(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a removal that needs links, which some file systems do not have."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    refuse.__name__ = "link"
    monkeypatch.setattr(os, "link", refuse)
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 30)
    assert steps_in(memory) == [30] and value_of_step(memory, 30) == 30


def test_two_managers_of_one_run(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches a removal that fails because another process removes the same step."""
    train(manager_of(memory), 1, 100)
    managers = [manager_of(memory, keep_last=1) for _ in range(4)]
    for manager in managers:
        manager._keeper.tidy()
    assert all(manager.wait_removed(20) for manager in managers)
    managers[0].save(110, model(110))
    managers[0].close()
    assert steps_in(memory) == [110] and not records("removal failed")
