"""`CheckpointManager`: saving, resuming, finding and keeping the steps of a run."""

from __future__ import annotations

import _thread
import errno
import fcntl
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import shardsave
from faults.dying import die_before_the_commit, killed
from shardsave._cli.main import cli
from shardsave._common import os_calls
from shardsave._format.crc64 import crc64
from shardsave._runs import remover, steps
from shardsave._runs.recorded import RECORD_NAME
from shardsave._storage import removal
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.transaction import Transaction
from support import forked, holds_in_child

INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks


def model(value: float = 0.0) -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(value)
    return layer


def value_of(layer: nn.Linear) -> float:
    """The one value of all its weights."""
    (value,) = {*layer.weight.flatten().tolist(), *layer.bias.tolist()}
    return float(value)


def manager_of(folder: Path, **options: Any) -> shardsave.CheckpointManager:
    return shardsave.CheckpointManager(folder, **{"save_every": 10, "durable": False, "progress": False, **options})


def train(manager: shardsave.CheckpointManager, first: int, last: int) -> list[int]:
    """Steps of a training whose weights are the number of the step. Returns which were saved."""
    return [step for step in range(first, last + 1) if manager.step(step, model(step), metrics={"loss": 100.0 / step})]


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def flip(folder: Path, step: int) -> None:
    """Changes the last byte of a step's data."""
    (shard,) = path_of(folder, step).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, Any]]]:
    """``records(event)``: the facts of the log records of that event."""
    caplog.set_level(logging.DEBUG, "shardsave")
    return lambda event: [record.shardsave for record in caplog.records if record.shardsave["event"] == event]  # type: ignore[attr-defined]


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
    assert latest is not None and latest.step == 70 and latest.metrics == {"loss": 100 / 70} and latest.committed
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
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Catches an argument that would be noticed only after hours of training."""
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        manager_of(tmp_path, **wrong)


def test_a_wrong_keyword_of_a_step(tmp_path: Path) -> None:
    """Catches a keyword that is wrong and shows only when the first step is saved."""
    with pytest.raises(TypeError, match="keywords of CheckpointManager or of save were expected, not durabel"):
        manager_of(tmp_path).step(1, model(), durabel=True)
    with pytest.raises(TypeError, match="not durabel"):
        manager_of(tmp_path).save(1, model(), durabel=True)


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
    with pytest.raises(shardsave.SaveNotCommittedError, match="step 30 is there already; resume it, or give the run another"):
        train(manager_of(memory, keep_last=1), 1, 30)
    assert steps_in(memory) == [10, 20, 30]


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


# --- corrupt steps ---


def damage_flip(folder: Path) -> None:
    flip(folder, 30)


def damage_cut(folder: Path) -> None:
    (shard,) = path_of(folder, 30).glob("*.safetensors")
    os.truncate(shard, 4000)


def damage_missing(folder: Path) -> None:
    (shard,) = path_of(folder, 30).glob("*.safetensors")
    shard.unlink()


def damage_index(folder: Path) -> None:
    os.truncate(path_of(folder, 30) / INDEX, 100)


def damage_kind(folder: Path) -> None:
    (path_of(folder, 30) / INDEX).unlink()
    (path_of(folder, 30) / INDEX).mkdir()


DAMAGES = [damage_flip, damage_cut, damage_missing, damage_index, damage_kind]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_latest_step(
    memory: Path, damage: Callable[[Path], None], records: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Catches a resume that fails, or takes a damaged step, where the one before is whole; and one that says nothing of it."""
    train(manager_of(memory), 1, 30)
    damage(memory)
    fresh = model(7)
    if damage is not damage_flip:
        assert manager_of(memory).latest().step == 20  # type: ignore[union-attr]
        with pytest.raises(shardsave.CorruptCheckpointError, match=r"cannot resume from .*step-00000030"):
            manager_of(memory, on_corrupt="raise").latest()
    resumed = manager_of(memory).resume(fresh)
    assert resumed is not None and (resumed.step, value_of(fresh)) == (20, 20)
    assert len(resumed.notes) == 1 and f"{path_of(memory, 30)} is corrupt and was passed over" in resumed.notes[0]
    assert {facts["step"] for facts in records("step corrupt")} == {30} and records("resumed")[0]["step"] == 20
    with pytest.raises(shardsave.CorruptCheckpointError, match=r"cannot resume from .*step-00000030: .*on_corrupt='previous'"):
        manager_of(memory, on_corrupt="raise").resume(model())


@pytest.mark.parametrize("damage", [damage_flip, damage_cut])
def test_a_corrupt_step_is_not_counted(memory: Path, damage: Callable[[Path], None]) -> None:
    """Catches a policy that keeps a damaged step in the place of a whole one; and one that is not saved again when it is its turn."""
    train(manager_of(memory), 1, 30)
    damage(memory)
    with manager_of(memory, keep_last=2, save_every=5) as manager:
        assert manager.resume(model()).step == 20  # type: ignore[union-attr]
        manager.save(25, model(25))
        manager.wait_removed()
        assert steps_in(memory) == [20, 25, 30]
        train(manager, 26, 30)
    assert steps_in(memory) == [25, 30] and value_of_step(memory, 30) == 30


@pytest.mark.parametrize("pattern", ["*.tensors", "rank-00000.json", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_training_state(memory: Path, pattern: str, damage: str) -> None:
    """Catches a step that counts as committed although a file of its training state is missing or cut: a policy would then remove the
    whole steps before it, and keep the one that no training can resume.
    """
    net = model(1)
    training = {"average": torch.ones(3)}
    manager = manager_of(memory, rng=True)
    for step in (10, 20, 30):
        manager.save(step, net, training=training)
    (file,) = path_of(memory, 30).glob(f"training-*/{pattern}")
    file.unlink() if damage == "missing" else os.truncate(file, file.stat().st_size - 1)
    with manager_of(memory, rng=True, keep_last=2) as manager:
        assert [info.state for info in manager.steps()] == ["committed", "committed", "corrupt"]
        assert file.name in manager.steps()[-1].problem
        assert manager.latest().step == 20  # type: ignore[union-attr]
        manager.save(40, net, training=training)
    assert steps_in(memory) == [20, 30, 40]


def value_of_step(folder: Path, step: int) -> float:
    fresh = model()
    shardsave.load_model(fresh, path_of(folder, step))
    return value_of(fresh)


def test_nothing_but_corrupt_steps(memory: Path) -> None:
    """Catches a training that begins anew over a run of which every step is damaged."""
    train(manager_of(memory), 1, 20)
    for step in (10, 20):
        flip(memory, step)
    with pytest.raises(shardsave.CorruptCheckpointError, match=r"2 steps are corrupt .*the model may be filled in part"):
        manager_of(memory).resume(model())


def test_a_load_that_does_not_fill_everything(memory: Path) -> None:
    """Catches a model with values of a damaged step: the step before would not fill every tensor that the damaged one has filled."""
    manager = manager_of(memory)
    manager.save(10, model(10))
    both = nn.ModuleDict({"a": model(1), "b": model(2)})
    manager.save(20, both)
    (shard,) = path_of(memory, 20).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(shardsave.CorruptCheckpointError, match="checksum"):
        manager_of(memory).resume(nn.ModuleDict({"a": model(), "b": model()}), strict=False)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", ["step-00000030", INDEX, "model-00001-of-00001.safetensors"])
def test_what_cannot_be_read_is_not_corrupt(memory: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """Catches a resume that steps back because of a disk, a permission, a limit or a server that is not well at this moment."""
    train(manager_of(memory), 1, 30)
    open_ = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else ""
        full = os.path.join(where, os.fspath(path))
        if "step-00000030" in full and full.endswith(name):
            raise OSError(number, os.strerror(number))
        return open_(path, flags, mode, dir_fd=dir_fd)

    refuse.__name__ = "open"
    monkeypatch.setattr(os, "open", refuse)
    fresh = model(7)
    with pytest.raises(shardsave.ShardSaveError, match=os.strerror(number)) as caught:
        manager_of(memory).resume(fresh)
    assert not isinstance(caught.value, (shardsave.CorruptCheckpointError, shardsave.CheckpointNotFoundError))
    assert value_of(fresh) == 7
    if not name.startswith("model-"):
        with pytest.raises(shardsave.ShardSaveError, match=os.strerror(number)):
            manager_of(memory).latest()
        assert [info.state for info in manager_of(memory).steps()] == ["committed", "committed", "unreadable"]


def test_a_step_of_a_newer_version(memory: Path) -> None:
    """Catches a resume that steps back over a step that only a newer version can read, and a policy that removes it."""
    with manager_of(memory) as manager:
        train(manager, 1, 20)
    path = path_of(memory, 20) / INDEX
    body = path.read_bytes().replace(b'"requires": []', b'"requires": ["x"]')[: -len('"}}\n') - 16]
    path.write_bytes(body + f"{crc64(body):016x}".encode() + b'"}}\n')
    for action in (lambda: manager_of(memory).resume(model()), manager_of(memory).latest):
        with pytest.raises(shardsave.IncompatibleCheckpointError, match="newer version"):
            action()
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 25, 40)
    assert steps_in(memory) == [20, 40]


# --- what died processes leave ---


def test_unfinished_steps(memory: Path) -> None:
    """Catches a step of a killed saver that counts as the latest, or that stays for ever."""
    train(manager_of(memory), 1, 20)
    path_of(memory, 30).mkdir()
    killed(path_of(memory, 30), die_before_the_commit)
    path_of(memory, 25).mkdir()
    manager = manager_of(memory, keep_last=2)
    assert [info.state for info in manager.steps()] == ["committed", "committed", "unfinished", "unfinished"]
    assert manager.latest().step == 20  # type: ignore[union-attr]
    manager.resume(model())
    manager.save(40, model(40))
    manager.close()
    assert steps_in(memory) == [20, 40]


def test_a_save_at_work(memory: Path) -> None:
    """Catches a save of another process that is taken for a dead one, or for the latest step."""
    train(manager_of(memory), 1, 10)
    states: list[str] = []

    def look(done: int, total: int) -> None:
        states.extend(info.state for info in manager_of(memory).steps())
        assert manager_of(memory).latest().step == 10  # type: ignore[union-attr]

    manager_of(memory).save(20, model(20), progress=look)
    assert states[:2] == ["committed", "saving"]


def test_a_step_that_changes_while_it_is_listed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that counts as corrupt because a save has just replaced its files, or as committed because it has just gone."""
    train(manager_of(memory), 1, 20)
    look = steps.files_there

    def look_later(*arguments: Any) -> Any:
        monkeypatch.setattr(steps, "files_there", look)
        changes.pop(0)()
        return look(*arguments)

    changes: list[Callable[[], object]] = [
        lambda: shardsave.save(model(7), path_of(memory, 10), durable=False),
        lambda: shutil.rmtree(path_of(memory, 10)),
    ]
    for state in ("committed", "unfinished"):
        monkeypatch.setattr(steps, "files_there", look_later)
        assert [info.state for info in manager_of(memory).steps()] == [state, "committed"]
    assert [info.step for info in manager_of(memory).steps()] == [20]


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


# --- pins and readers ---


def test_pins(memory: Path) -> None:
    """Catches a pinned step that goes, also under another process, or one that stays after its pin is gone."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        assert holds_in_child(lambda: manager_of(memory).pin(10) is None)
        manager.pin(10)
        train(manager, 11, 30)
        manager.wait_removed()
        assert steps_in(memory) == [10, 30] and manager.steps()[0].pinned
        manager.unpin(10)
        manager.unpin(10)
        train(manager, 31, 40)
    assert steps_in(memory) == [40]
    for step in (10, 50):
        with pytest.raises(shardsave.CheckpointNotFoundError, match=f"cannot pin .*{step:08d}"):
            manager.pin(step)
        with pytest.raises(shardsave.CheckpointNotFoundError, match=f"cannot unpin .*{step:08d}"):
            manager.unpin(step)


def test_a_pin_that_comes_late(
    memory: Path, monkeypatch: pytest.MonkeyPatch, records: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Catches the removal of a step that was pinned after the policy was asked."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        monkeypatch.setattr(remover.Remover, "_make_durable", lambda self, kept: manager_of(memory).pin(10))
        train(manager, 11, 20)
    assert steps_in(memory) == [10, 20] and [facts["step"] for facts in records("step pinned")] == [10]


def test_a_step_that_is_read(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches a step that goes while someone reads it under a shared lock, as `resume` does, and one that stays afterwards."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        reader = os.open(path_of(memory, 10), os.O_RDONLY)
        fcntl.flock(reader, fcntl.LOCK_SH)
        train(manager, 11, 20)
        manager.wait_removed()
        assert steps_in(memory) == [10, 20] and [facts["step"] for facts in records("step in use")] == [10]
        os.close(reader)
        train(manager, 21, 30)
    assert steps_in(memory) == [30]


def test_resume_holds_the_lock(memory: Path) -> None:
    """Catches a resume whose step another process may remove meanwhile."""
    train(manager_of(memory), 1, 10)
    locked: list[bool] = []

    def look(done: int, total: int) -> None:
        fd = os.open(path_of(memory, 10), os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.append(True)
        os.close(fd)

    manager_of(memory).resume(model(), progress=look)
    assert locked and all(locked)


def test_an_open_step_can_be_read_to_the_end(memory: Path) -> None:
    """Catches a step whose tensors go while this process has it open."""
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 1, 10)
        with shardsave.open(path_of(memory, 10)) as opened:
            first = opened["bias"]
            train(manager, 11, 20)
            manager.wait_removed()
            assert steps_in(memory) == [20]
            assert torch.equal(opened["weight"], torch.full((2, 3), 10.0)) and torch.equal(first, torch.full((2,), 10.0))


# --- full disks, threads, forks ---


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
    with pytest.raises(shardsave.OutOfSpaceError, match="the policy would remove no step"):
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


LEAVING = """
import sys, time, torch, shardsave
from shardsave._runs import remover, steps
remover.remove_step = lambda run, step: time.sleep(60)
manager = shardsave.CheckpointManager(sys.argv[1], save_every=1, keep_last=1, durable=False, progress=False)
for step in (1, 2):
    manager.step(step, {"x": torch.ones(3)})
assert not manager.wait_removed(0)
"""


def test_the_process_ends_before_the_thread(memory: Path) -> None:
    """Catches a process that does not end because a thread still removes steps; and steps that nobody removes then."""
    command = [sys.executable, "-W", "error", "-c", LEAVING, str(memory)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, "")
    with manager_of(memory, keep_last=1) as manager:
        manager.save(3, {"x": torch.ones(3)})
    assert steps_in(memory) == [3]


def interrupted_removal(folder: Path) -> None:
    """Leaves step 10 of three without its index, and with all its other files."""
    with patch.object(removal, "finish_removal", side_effect=[removal.RemovedCheckpoint(), SystemExit]):
        manager = manager_of(folder, keep_last=2)
        train(manager, 1, 30)
        manager.wait_removed()
    assert [info.state for info in manager.steps()] == ["removing", "committed", "committed"]


def test_interrupted_removals_are_finished_by_clean(memory: Path) -> None:
    """Catches files of a half-removed step that `clean` does not find, and a whole step that it touches."""
    interrupted_removal(memory)
    with pytest.raises(shardsave.CheckpointNotFoundError):
        shardsave.load(path_of(memory, 10))
    report = shardsave.clean(memory, remove=False)
    (leaving,) = report.found
    assert leaving.name == f"step-00000010/{INDEX}.removed" and len(leaving.files) == 2 and report.removed == ()
    report = shardsave.clean(memory)
    assert report.removed == (leaving.name,) and not report.left and steps_in(memory) == [20, 30]
    assert value_of_step(memory, 20) == 20
    assert not shardsave.clean(memory).found


def test_clean_goes_on_after_a_corrupt_step(memory: Path) -> None:
    """Catches one corrupt or busy step in a run because of which the others are never cleaned, and one that is not named."""
    interrupted_removal(memory)
    damage_index(memory)
    before = sorted(path_of(memory, 30).iterdir())
    with closing(LockedDirectory(str(path_of(memory, 20)), durable=False)) as folder:
        folder.acquire(0.0, purpose="test", state="")
        report = shardsave.clean(memory, lock_timeout=0.01)
    busy, corrupt = report.refused
    assert str(path_of(memory, 20)) in busy and str(path_of(memory, 30)) in corrupt and "nothing was removed" in corrupt
    assert len(report.removed) == 1 and not report.left and str(report).startswith(busy)
    assert steps_in(memory) == [20, 30] and sorted(path_of(memory, 30).iterdir()) == before
    result = CliRunner().invoke(cli, ["clean", str(memory)])
    assert result.exit_code == 1 and "step-00000030" in result.output and "in the other steps" in result.output


def test_a_step_is_saved_again_after_an_interrupted_removal(memory: Path) -> None:
    """Catches files of the old step that stay beside those of the new one, and files of the new one that go with the old one's."""
    interrupted_removal(memory)
    shardsave.save(model(77), path_of(memory, 10), durable=False)
    assert manager_of(memory).steps()[0].half_removed and manager_of(memory).steps()[0].committed
    with manager_of(memory) as manager:
        manager.save(40, model(40))
    assert value_of_step(memory, 10) == 77 and steps_in(memory) == [10, 20, 30, 40]
    info = shardsave.inspect(path_of(memory, 10))
    assert {*os.listdir(path_of(memory, 10))} == {INDEX, *info.shards}


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


def train_and_print(folder: Path, write_end: int) -> None:
    """Trains on from the latest step, as a user's program does, and tells which steps it has committed."""
    report = lambda report: os.write(write_end, f"{int(Path(report.path).name[5:])}\n".encode())
    with manager_of(folder, keep_last=2, keep_every=50, durable=True, on_commit=report) as manager:
        fresh = model()
        resumed = manager.resume(fresh)
        assert resumed is None or value_of(fresh) == resumed.step
        train(manager, resumed.next_step if resumed else 1, 100_000)


def test_killed_at_any_moment(memory: Path) -> None:
    """Catches a step that was committed and is gone against the policy, one that is there in part, and a resume from another one."""
    chance, committed, window = random.Random(1), [0], 0.1  # seconds; adapts to the machine
    for _ in range(int(os.environ.get("SHARDSAVE_KILLS", "100")) // 8):
        read_end, write_end = os.pipe()
        child = forked(lambda: train_and_print(memory, write_end))
        os.close(write_end)
        time.sleep(window * (0.5 + chance.random()))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with os.fdopen(read_end) as said:
            new = [*map(int, said.read().split())]
        committed += new
        window *= 1 if new else 2
        infos = [info for info in manager_of(memory).steps() if info.committed]
        assert (infos[-1].step if infos else 0) in (committed[-1], committed[-1] + 10)
        assert {step for step in range(50, committed[-1] + 1, 50)} <= {info.step for info in infos}
        assert all(value_of_step(memory, info.step) == info.step for info in infos)
    assert committed[-1] >= 10
    with manager_of(memory, keep_last=2, keep_every=50) as manager:
        manager.save(100_000, model(0))
    assert all(step % 50 == 0 for step in steps_in(memory)[:-2])
    assert not [info for info in manager.steps() if not info.committed]
