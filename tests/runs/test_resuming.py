"""From which step a manager resumes: corrupt steps, steps that cannot be read, and steps of newer versions."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import shardsave
from faults.dying import die_before_the_commit, killed
from shardsave._cli.main import cli
from shardsave._format.crc64 import crc64
from training_run import INDEX, flip, manager_of, model, path_of, steps_in, train, value_of, value_of_step


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


def damage_lost_index(folder: Path) -> None:
    (path_of(folder, 30) / INDEX).unlink()


DAMAGES = [damage_flip, damage_cut, damage_missing, damage_index, damage_kind, damage_lost_index]


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
    assert {facts["step"] for facts in records("step corrupt")} == {30} and [facts["step"] for facts in records("resume")] == [
        20
    ]
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


def test_nothing_but_corrupt_steps(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a training that begins anew over a run of which every step is damaged."""
    train(manager_of(memory), 1, 20)
    for step in (10, 20):
        flip(memory, step)
    caplog.set_level("WARNING", "shardsave")
    with pytest.raises(shardsave.CorruptCheckpointError, match=r"2 steps are corrupt .*the model may be filled in part"):
        manager_of(memory).resume(model())
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [" is corrupt, and is passed over: " in message for message in warned] == [True, True]


def test_nothing_to_resume(memory: Path, records: Callable[[str], list[dict[str, Any]]]) -> None:
    """Catches a training that begins anew, for example in a wrong directory, and nothing in the log says so."""
    path_of(memory, 10).mkdir()
    assert manager_of(memory).resume(model()) is None
    assert records("nothing to resume") == [{"event": "nothing to resume", "path": str(memory)}]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_as_a_run(memory: Path, asynchronous: bool) -> None:
    """Catches a training that begins anew, and saves its steps inside of a checkpoint, since a step was passed as the run."""
    train(manager_of(memory), 1, 10)
    (memory / "lone").mkdir()
    (memory / "lone" / "model.safetensors").write_bytes(b"")
    for path in (path_of(memory, 10), memory / "lone"):
        before = sorted(path.iterdir())
        manager = manager_of(path, asynchronous=asynchronous)
        for action in (lambda manager=manager: manager.resume(model()), lambda manager=manager: manager.save(20, model(20))):
            with pytest.raises(
                shardsave.IncompatibleCheckpointError, match="a run was expected, .* it is a checkpoint itself, with model"
            ):
                action()
        assert sorted(path.iterdir()) == before
    shardsave.save(model(1), memory, durable=False)  # beside the steps of a run
    manager_of(memory).save(20, model(20))


@pytest.mark.parametrize("options", [{}, {"training": {"epoch": 1}, "max_shard_size": "1kB"}, {"only": "trainable"}], ids=str)
def test_a_run_without_indexes(memory: Path, options: dict[str, Any]) -> None:
    """Catches a training that begins anew, since the indexes of its steps are lost; and a lost index for which a save takes its own."""
    manager_of(memory).save(10, model(10), **options)
    (path_of(memory, 10) / INDEX).unlink()
    (info,) = manager_of(memory).steps()
    assert info.state == "corrupt" and re.match(f"its index {INDEX} is missing, and model-.* is there", info.problem)
    with pytest.raises(shardsave.CorruptCheckpointError, match="1 step is corrupt .*its index .* is missing"):
        manager_of(memory).resume(model())
    killed(path_of(memory, 10), die_before_the_commit)
    assert [info.state for info in manager_of(memory).steps()] == ["corrupt"]
    with manager_of(memory) as manager:
        manager.save(20, model(20))
    assert steps_in(memory) == [10, 20] and len([*path_of(memory, 10).glob("*.safetensors")]) >= 1


def test_a_load_that_does_not_fill_everything(memory: Path) -> None:
    """Catches a model with values of a damaged step: the step before would not fill every tensor that the damaged one has filled."""
    manager = manager_of(memory)
    manager.save(10, model(10))
    both = nn.ModuleDict({"a": model(1), "b": model(2)})
    manager.save(20, both)
    (shard,) = path_of(memory, 20).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(shardsave.CorruptCheckpointError, match="step-00000020: .*checksum.*the step before it is not taken"):
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


def rename(run: Path) -> None:
    path_of(run, 20).rename(path_of(run, 30))


def link(run: Path) -> None:
    path_of(run, 30).symlink_to(path_of(run, 20).name)


def copy(run: Path) -> None:
    shutil.copytree(path_of(run, 20), path_of(run, 30))


@pytest.mark.parametrize("change", [rename, link, copy])
def test_a_step_under_the_name_of_another(memory: Path, change: Callable[[Path], None]) -> None:
    """Catches a resume that takes the number of a step from the name of its directory, though its weights are those of another; such a
    directory that counts for a policy, or that a policy removes; and a save through a link into another step.
    """
    train(manager_of(memory), 1, 20)
    change(memory)
    *_, info = manager_of(memory).steps()
    assert (info.step, info.state) == (30, "corrupt")
    assert info.problem == "it is step 20, not step 30: the directory was renamed, copied or linked"
    fresh, right = model(7), 10 if change is rename else 20
    assert manager_of(memory).latest().step == right  # type: ignore[union-attr]
    resumed = manager_of(memory).resume(fresh)
    assert resumed is not None and (resumed.step, value_of(fresh)) == (right, right)
    assert (
        len(resumed.notes) == 1 and f"{path_of(memory, 30)} is corrupt and was passed over: it is step 20," in resumed.notes[0]
    )
    with pytest.raises(shardsave.CorruptCheckpointError, match="step-00000030: it is step 20, not step 30"):
        manager_of(memory, on_corrupt="raise").resume(fresh)
    assert shardsave.resume(path_of(memory, 30), fresh).step == 20
    manager = manager_of(memory, keep_last=1)
    if change is link:
        with pytest.raises(
            shardsave.SaveNotCommittedError, match="it is a symbolic link; nothing was written, what it leads to is"
        ):
            manager.save(30, model(30))
        assert value_of_step(memory, 20) == 20
        path_of(memory, 30).unlink()
    manager.save(30, model(30))
    manager.save(40, model(40))
    manager.close()
    assert steps_in(memory) == [40] and value_of_step(memory, 40) == 40


def test_a_renamed_step_stays(memory: Path) -> None:
    """Catches a policy that removes a directory of which nobody knows which step it is; and a run of such steps that begins anew."""
    train(manager_of(memory), 1, 20)
    path_of(memory, 10).rename(path_of(memory, 15))
    with manager_of(memory, keep_last=1) as manager:
        train(manager, 21, 40)
    assert steps_in(memory) == [15, 40] and value_of_step(memory, 15) == 10
    path_of(memory, 40).rename(path_of(memory, 50))
    with pytest.raises(shardsave.CorruptCheckpointError, match="2 steps are corrupt"):
        manager_of(memory).resume(model())


def test_a_step_without_a_number(memory: Path) -> None:
    """Catches a step that is refused because a plain `save` made it, which was given no number."""
    shardsave.save(model(30), path_of(memory, 30), durable=False)
    fresh = model()
    resumed = manager_of(memory).resume(fresh)
    assert resumed is not None and (resumed.step, value_of(fresh)) == (30, 30)


def test_a_link_to_a_step_without_a_number(memory: Path) -> None:
    """Catches a link to another step whose index says no number, and a step that was moved away and is taken for another one."""
    shardsave.save(model(30), path_of(memory, 30), durable=False)
    path_of(memory, 40).symlink_to(path_of(memory, 30))
    assert [(info.step, info.state) for info in manager_of(memory).steps()] == [(30, "committed"), (40, "corrupt")]
    path_of(memory, 30).rename(memory / "archive")
    path_of(memory, 30).symlink_to("archive")
    assert [(info.step, info.state) for info in manager_of(memory).steps()] == [(30, "committed"), (40, "corrupt")]
    fresh = model()
    resumed = manager_of(memory).resume(fresh)
    assert (
        resumed is not None and (resumed.step, value_of(fresh)) == (30, 30) and "it is step 30, not step 40" in resumed.notes[0]
    )


@pytest.mark.parametrize("of_whole_path", [True, False])
def test_a_run_behind_a_link(memory: Path, monkeypatch: pytest.MonkeyPatch, of_whole_path: bool) -> None:
    """Catches a run that cannot be saved, listed, resumed or cleaned because its directory is a symbolic link."""
    (memory / "disk").mkdir()
    (memory / "run").symlink_to(memory / "disk" if of_whole_path else "disk")
    monkeypatch.chdir(memory)
    for path, first in ((Path("run"), 1), (memory / "run", 41)):
        last = first + 39
        with manager_of(path, keep_last=2) as manager:
            assert (manager.resume(model()) is None) == (first == 1)
            assert train(manager, first, last) == [last - 30, last - 20, last - 10, last]
            manager.pin(last)
        fresh = model()
        assert manager_of(path).resume(fresh).step == last == value_of(fresh)  # type: ignore[union-attr]
        assert manager_of(f"{path}/").latest().step == last  # type: ignore[arg-type,union-attr]
        listed = CliRunner().invoke(cli, ["list", f"{path}/"])
        assert listed.exit_code == 0 and f"  {last}  " in listed.output
        assert f"this is the latest: {path}/step-{last:08d}" in CliRunner().invoke(cli, ["inspect", str(path)]).output
        path_of(path, 100).mkdir()
        assert shardsave.clean(f"{path}/").removed == ("step-00000100",)
    assert (memory / "run").is_symlink() and steps_in(memory / "disk") == [40, 70, 80]


def test_a_run_behind_a_link_to_nothing(memory: Path) -> None:
    """Catches a training that begins anew because the disk with its run is not mounted, and an error that does not name the link, or does
    not say of a save that it was not made."""
    (memory / "run").symlink_to(memory / "disk")
    with pytest.raises(shardsave.ShardSaveError, match="run.* symbolic link"):
        manager_of(memory / "run").resume(model())
    with pytest.raises(
        shardsave.SaveNotCommittedError, match="save to .*step-00000010: .*run.* symbolic link .*nothing was written$"
    ):
        manager_of(memory / "run").save(10, model())
    assert CliRunner().invoke(cli, ["list", str(memory / "run")]).exit_code == 3
