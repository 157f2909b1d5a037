"""Runs of processes that died: unfinished saves, interrupted removals, and what the next manager or `clean` makes of them."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner

import shardsave
from faults.dying import die_before_the_commit, killed
from shardsave._cli.main import cli
from shardsave._storage import removal
from shardsave._storage.lock import LockedDirectory
from support import forked
from training_run import INDEX, manager_of, model, path_of, steps_in, train, value_of, value_of_step
from warm_python import warm_python

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks


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
    ended = warm_python().run(["-c", LEAVING, memory], action="error")
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
    os.truncate(path_of(memory, 30) / INDEX, 100)
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


@pytest.mark.parametrize("of_the_run", [True, False])
def test_an_empty_step(memory: Path, of_the_run: bool) -> None:
    """Catches the empty directory of a step, of a save that was killed at once, which `clean` does not find or does not remove."""
    train(manager_of(memory / "run"), 1, 10)
    path = path_of(memory / "run", 20)
    path.mkdir()
    cleaned = memory / "run" if of_the_run else path
    report = shardsave.clean(cleaned, remove=False)
    assert [leaving.name for leaving in report.found] == ["step-00000020"] and report.left and path.is_dir()
    result = CliRunner().invoke(cli, ["clean", str(cleaned), "--dry-run"])
    assert result.exit_code == 1 and "step-00000020  0 files   0 B  dead" in result.output and path.is_dir()
    result = CliRunner().invoke(cli, ["clean", f"{cleaned}/", "--yes"])
    assert (
        result.exit_code == 0 and result.output.endswith("1 leaving of crashed saves, 0 B; 1 removed\n") and not path.exists()
    )
    path.mkdir()
    report = shardsave.clean(cleaned)
    assert report.removed == ("step-00000020",) and not report.left and not path.exists()
    assert steps_in(memory / "run") == [10]


@pytest.mark.parametrize("of_the_run", [True, False])
def test_a_step_that_is_empty_after_the_cleaning(memory: Path, of_the_run: bool) -> None:
    """Catches the empty directory that stays once what a killed first save left in it is gone."""
    path = path_of(memory, 20)
    path.mkdir()
    killed(path, die_before_the_commit)
    report = shardsave.clean(memory if of_the_run else path)
    assert len(report.removed) == 1 and ".shardsave-" in report.removed[0] and not report.left and not path.exists()


def test_directories_that_stay(memory: Path) -> None:
    """Catches the removal of a directory that is no step of ours, that is not empty, that a link leads to, or that somebody locks."""
    for name in ("step-1", "other", "step-00000020", "archive"):
        (memory / name).mkdir()
    (memory / "step-00000020" / "notes.txt").write_text("mine")
    (memory / "step-00000030").symlink_to(memory / "archive")
    for path in (memory, *(path for path in memory.iterdir())):
        assert not shardsave.clean(path).found
        assert not shardsave.clean(f"{path}/").found
    assert len([*memory.iterdir()]) == 5
    path_of(memory, 40).mkdir()
    with closing(LockedDirectory(str(path_of(memory, 40)), durable=False)) as folder:
        folder.acquire(0.0, purpose="test", state="")
        with pytest.raises(shardsave.DirectoryBusyError):
            shardsave.clean(path_of(memory, 40), lock_timeout=0.01)
    assert path_of(memory, 40).is_dir()


def test_a_directory_that_is_cleaned_before_it_is_locked(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that fails because its new directory, still empty and not locked yet, was removed as a leaving."""
    acquire = LockedDirectory.acquire

    def acquire_later(self: LockedDirectory, *arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(LockedDirectory, "acquire", acquire)
        assert shardsave.clean(memory).removed == ("step-00000010",)
        acquire(self, *arguments, **options)

    monkeypatch.setattr(LockedDirectory, "acquire", acquire_later)
    manager_of(memory).save(10, model(10))
    assert value_of_step(memory, 10) == 10
