"""`CheckpointManager`: what it saves and when, what it refuses, and what a failed save leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardsave
from shardsave._common import os_calls
from shardsave._runs.recorded import RECORD_NAME
from shardsave._storage.transaction import Transaction
from training_run import flip, manager_of, model, path_of, steps_in, train, value_of, value_of_step


def test_a_run(memory: Path) -> None:
    """Catches a step 0 that is saved, a resume that does not go on where the run ended, and steps that stay or go against the policy."""
    with manager_of(memory / "run", keep_last=2, keep_every=40, keep_best=("loss", "max", 1)) as manager:
        assert manager.resume(model()) is None and manager.latest() is None and manager.steps() == ()
        assert manager.step(0, model()) is None
        assert train(manager, 1, 65) == [10, 20, 30, 40, 50, 60]
    assert steps_in(memory / "run") == [10, 40, 50, 60]
    with manager_of(memory / "run", keep_last=2) as manager:
        fresh = model()
        resumed = manager.resume(fresh)
        assert resumed is not None and (resumed.step, resumed.next_step, resumed.notes) == (60, 61, ())
        assert value_of(fresh) == 60
        assert train(manager, resumed.next_step, 75) == [70]
    latest = manager.latest()
    assert (
        latest == manager.steps()[-1]
        and latest is not None
        and latest.step == 70
        and latest.metrics == {"loss": 100 / 70}
        and latest.committed
    )
    assert steps_in(memory / "run") == [60, 70]
    assert {path.name for path in (memory / "run").iterdir()} == {"step-00000060", "step-00000070", RECORD_NAME}


def test_a_training_state(memory: Path) -> None:
    """Catches a manager whose steps lack the training state, or that resumes the model alone; and a damaged optimizer after which the
    step before it is not taken.
    """
    net = model(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    with manager_of(memory, rng=True) as manager:
        for step in range(1, 21):
            net(torch.rand(3)).sum().backward()
            optimizer.step()
            manager.step(step, net, training={"optimizer": optimizer, "step": step})
    numbers = torch.rand(2)
    fresh = model()
    again = torch.optim.SGD(fresh.parameters(), 0.5, momentum=0.9)
    with manager_of(memory) as manager:
        resumed = manager.resume(fresh, training={"optimizer": again, "step": 0}, rng=True)
    assert (
        resumed is not None and resumed.next_step == 21 and resumed.values["step"] == 20 and torch.equal(torch.rand(2), numbers)
    )
    assert torch.equal(again.state[fresh.weight]["momentum_buffer"], optimizer.state[net.weight]["momentum_buffer"])
    (tensors,) = path_of(memory, 20).glob("training-*/*.tensors")
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = manager_of(memory).resume(fresh, training={"optimizer": again, "step": 0}, rng=True)
    assert resumed is not None and resumed.step == resumed.values["step"] == 10 and "nothing was changed" in resumed.notes[0]


def test_every_step_stays_without_a_policy(memory: Path) -> None:
    """Catches a manager that removes what nobody told it to remove."""
    with manager_of(memory) as manager:
        train(manager, 1, 50)
    assert steps_in(memory) == [10, 20, 30, 40, 50]


def test_steps_are_ordinary_checkpoints(memory: Path) -> None:
    """Catches a step that only the manager can read, metadata of the user that is lost, and options that do not reach the save."""
    with manager_of(memory, metadata={"run": "a"}, max_shard_size="1kB") as manager:
        report = manager.save(5, model(5), metadata={"lr": 1})
        assert report.path == str(path_of(memory, 5)) and not report.durable
    assert torch.equal(shardsave.load(path_of(memory, 5))["weight"], torch.full((2, 3), 5.0))
    assert shardsave.inspect(path_of(memory, 5)).metadata["lr"] == 1
    assert shardsave.verify(path_of(memory, 5)).intact


def test_the_step_in_reports(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches a report and a log record of a save that do not say which step it was."""
    manager = manager_of(memory)
    assert manager.save(5, model(5)).step == 5 and manager_of(memory, asynchronous=True).save(6, model(6)).wait().step == 6
    assert [facts["step"] for facts in records("save")] == [5, 6] and shardsave.save(model(1), memory / "other").step is None


def test_metrics(memory: Path) -> None:
    """Catches a metric that comes back as another number, also one that JSON does not have, and one that is no number."""
    manager = manager_of(memory)
    given = {"loss": torch.tensor(1.5, requires_grad=True), "n": np.int64(3), "nan": float("nan"), "inf": float("inf")}
    manager.save(1, model(), metrics=given)
    (info,) = manager.steps()
    assert info.metrics["loss"] == 1.5 and info.metrics["n"] == 3 and info.metrics["inf"] == float("inf")
    assert info.metrics["nan"] != info.metrics["nan"]
    for wrong in ({"loss": "x"}, {"loss": "nan"}, {"loss": True}, {1: 2.0}, [1], {"t": torch.ones(2)}):
        with pytest.raises(TypeError, match="metrics must map names to numbers"):
            manager.save(2, model(), metrics=wrong)  # type: ignore[arg-type]
    assert steps_in(memory) == [1]


WRONG: list[dict[str, Any]] = [
    {"keep_last": 0}, {"keep_last": True}, {"keep_every": "5"}, {"keep_best": "loss"}, {"keep_best": ("loss", "least", 1)},
    {"keep_best": ("loss", "min", 0)}, {"policy": 3}, {"on_commit": "x"}, {"on_corrupt": "ignore"}, {"save_every": 0},
    {"keep_lest": 3}, {"step": 3}, {"directory": "x"},
    {"max_shard_size": "2 stones"}, {"dtype": "float99"}, {"durable": "yes"}, {"rng": 1}, {"only": "frozen"}, {"progress": "bar"},
    {"lock_timeout": -1}, {"metadata": {3: 4}}, {"architecture": 2}, {"process_group": 3}, {"program": 3}, {"adapter_only": None},
    {"dtype": "float16", "rng": True}, {"staging": "copy", "asynchronous": True}, {"step_timeout": "x", "asynchronous": True},
    {"if_busy": None, "asynchronous": True}, {"check_unchanged": 3, "asynchronous": True}, {"background_workers": 0, "asynchronous": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Catches an argument that would be noticed only after hours of training."""
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        manager_of(tmp_path, **wrong)
    assert not any(tmp_path.iterdir())


def test_a_wrong_keyword_of_a_step(tmp_path: Path) -> None:
    """Catches a keyword that is wrong and shows only when the first step is saved."""
    with pytest.raises(TypeError, match="keywords of CheckpointManager or of save were expected, not durabel"):
        manager_of(tmp_path).step(1, model(), durabel=True)
    with pytest.raises(TypeError, match="not durabel"):
        manager_of(tmp_path).save(1, model(), durabel=True)
    with pytest.raises(ValueError, match="dtype='float16' saves no training state"):
        manager_of(tmp_path, rng=True).step(1, model(), dtype="float16")


@pytest.mark.parametrize("wrong", [-1, True, 1.0, "1", 10**16, None])
def test_wrong_steps(tmp_path: Path, wrong: Any) -> None:
    """Catches a step that has no name, or one that does not sort."""
    with pytest.raises((TypeError, ValueError), match="step must be"):
        manager_of(tmp_path).step(wrong, model())
    with pytest.raises(ValueError, match="step 0 is never saved"):
        manager_of(tmp_path).save(0, model())


def test_numbers_of_numpy(memory: Path) -> None:
    """Catches a whole number of numpy that the manager refuses though `save` takes it, and one that its record cannot hold."""
    options = {"save_every": np.int64(5), "keep_last": np.int32(1), "keep_best": ("loss", "min", np.uint8(1))}
    with manager_of(memory, **options) as manager:
        for step in np.arange(1, 16):
            manager.step(step, model(int(step)), metrics={"loss": float(step)})
        manager.pin(np.int64(15))
        assert type(manager.latest().step) is int  # type: ignore[union-attr]
    assert steps_in(memory) == [5, 15]


def test_large_steps(memory: Path) -> None:
    """Catches a step of nine digits that sorts before one of eight."""
    manager = manager_of(memory)
    for step in (99_999_999, 100_000_000):
        manager.save(step, model(1))
    assert [info.step for info in manager.steps()] == [99_999_999, 100_000_000]
    (memory / "step-000000001").mkdir()
    (memory / "step-1").mkdir()
    assert len(manager.steps()) == 2


def test_a_new_run_over_an_old_one(memory: Path) -> None:
    """Catches a training that begins anew in the directory of another one: `resume` would never find its steps, and a policy would
    remove them at once."""
    train(manager_of(memory), 1, 30)
    with pytest.raises(
        shardsave.SaveNotCommittedError, match="step 30 is there already; another process may be writing this run"
    ):
        train(manager_of(memory, keep_last=1), 1, 30)
    assert steps_in(memory) == [10, 20, 30]


def test_two_writers_of_one_run(memory: Path) -> None:
    """Catches a process that overwrites the steps of another one, which writes the same run at the same speed."""
    manager, other = manager_of(memory), manager_of(memory)
    manager.save(10, model(10))
    with pytest.raises(
        shardsave.SaveNotCommittedError, match="a new step, or one that .* it is there already; another process"
    ):
        other.save(10, model(11))
    assert value_of_step(memory, 10) == 10
    manager.save(10, model(12))
    manager.save(20, model(20))
    shardsave.save(
        model(21), path_of(memory, 20), step=20, durable=False
    )  # as a process does that began this save before ours ended
    for step in (20, 30):
        with pytest.raises(shardsave.SaveNotCommittedError, match="step 20 was expected to be as this .*; another process"):
            manager.save(step, model(30))
    assert steps_in(memory) == [10, 20] and value_of_step(memory, 20) == 21


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_writers_of_one_step(memory: Path, asynchronous: bool) -> None:
    """Catches a save that overwrites a step which another process began later and committed first."""
    other, others_model = manager_of(memory), model(11)

    class Slow:
        """Its state is asked for while the save is planned: after it was found that there is no such step, and before the lock."""

        def state_dict(self) -> dict[str, int]:
            if not path_of(memory, 10).exists():
                other.save(10, others_model)
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    manager = manager_of(memory, asynchronous=asynchronous)

    def save(step: int) -> None:
        saved: Any = manager.save(step, model(10), training=Slow())
        assert not asynchronous or saved.wait()

    with pytest.raises(
        shardsave.SaveNotCommittedError,
        match="cannot save step 10 to .*: a new step, or one that .* it is there already; another process .*; nothing was written",
    ):
        save(10)
    assert value_of_step(memory, 10) == 11 and steps_in(memory) == [10]
    assert [name for name in os.listdir(path_of(memory, 10)) if name.startswith(".")] == []
    manager.resume(model())
    save(20)
    assert value_of_step(memory, 20) == 10


def test_a_step_is_saved_again(memory: Path) -> None:
    """Catches a restart that cannot save the step again which it has resumed, or that it has passed over as damaged."""
    train(manager_of(memory), 1, 20)
    manager = manager_of(memory)
    assert manager.resume(model()).step == 20  # type: ignore[union-attr]
    manager.save(20, model(21))
    manager.save(30, model(30))
    flip(memory, 30)
    manager = manager_of(memory)
    assert manager.resume(model()).step == 20  # type: ignore[union-attr]
    assert train(manager, 21, 30) == [30] and value_of_step(memory, 30) == 30


def test_on_commit(memory: Path) -> None:
    """Catches a callback that does not get the report, or after the removal; one that fails, and hides that steps must go."""
    seen: list[tuple[str, list[int]]] = []
    with manager_of(memory, keep_last=1, on_commit=lambda report: seen.append((report.path, steps_in(memory)))) as manager:
        train(manager, 1, 20)
    assert seen == [(str(path_of(memory, 10)), [10]), (str(path_of(memory, 20)), [10, 20])]

    def fail(report: shardsave.SaveReport) -> None:
        raise OSError("no network")

    with manager_of(memory, keep_last=1, on_commit=fail) as manager:
        with pytest.raises(OSError, match="no network"):
            manager.save(30, model(30))
    assert steps_in(memory) == [30]


def test_a_full_disk(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed save that harms the run or ends the training, or that does not say what the policy will free."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        manager.wait_removed()
        huge = {"x": torch.zeros(1).expand(1 << 45)}
        with pytest.raises(
            shardsave.OutOfSpaceError, match=r"needs 140.7 TB, .* the policy removes step 10 and frees at most 4\.\d kB"
        ):
            manager.step(20, huge)
        assert steps_in(memory) == [10]
        assert train(manager, 21, 31) == [30]
    assert steps_in(memory) == [30]
    manager = manager_of(memory)
    with pytest.raises(
        shardsave.OutOfSpaceError, match="all steps are as they were, the latest is step 30; .* no step: remove some by hand"
    ):
        manager.save(40, huge)


def test_a_step_that_may_not_be_durable(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the removal of older steps because of one whose save could not tell whether it is on disk."""
    manager = manager_of(memory, keep_last=1)
    train(manager, 1, 20)
    manager.wait_removed()

    def fail(self: Transaction, *arguments: object) -> None:
        raise os_calls.CallFailed("fsync", "x", errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "_replace_companions", fail)
        with pytest.raises(shardsave.DurabilityUncertainError):
            manager.save(30, model(30))
    manager._keeper.tidy()
    manager.wait_removed()
    assert steps_in(memory) == [20, 30]
    manager.save(40, model(40))
    manager.close()
    assert steps_in(memory) == [30, 40]


def test_a_full_disk_and_a_policy_that_fails(memory: Path) -> None:
    """Catches a full disk that is hidden by an error of the user's own policy, which only words for the message were asked of."""

    def fail(steps: tuple[shardsave.StepInfo, ...]) -> list[int]:
        raise KeyError("colour\nred") if len(steps) > 1 else ZeroDivisionError

    manager, other = manager_of(memory, policy=fail), manager_of(memory)
    huge = {"x": torch.zeros(1).expand(1 << 45)}
    for number, words in ((20, "ZeroDivisionError"), (30, r"KeyError: 'colour\\nred'")):
        with pytest.raises(
            shardsave.OutOfSpaceError, match=r"needs 140.7 TB, .*; what the policy would remove is not known, "
        ) as caught:
            manager.save(number, huge)
        assert caught.match(f"it raised {words}$")
        other.save(10, model(10))
    assert steps_in(memory) == [10]


def test_one_record_of_a_resume(memory: Path, records: Callable[[str], list[dict[str, Any]]], caplog: Any) -> None:
    """Catches two records of one resume, each with a part of the facts."""
    train(manager_of(memory), 1, 20)
    flip(memory, 20)
    caplog.clear()
    resumed = manager_of(memory).resume(model())
    assert resumed is not None and [record.shardsave["event"] for record in caplog.records] == ["step corrupt", "resume"]
    (facts,) = records("resume")
    assert (facts["path"], facts["step"]) == (str(path_of(memory, 10)), 10) and facts["bytes"] > 0 and "notes" in facts
