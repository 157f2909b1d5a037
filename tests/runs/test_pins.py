"""Steps that must not go: pinned ones, and those that somebody reads or changes at this moment."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardsave
from shardsave._common.os_calls import CallFailed
from shardsave._runs import remover, steps
from shardsave._storage.directory import Directory
from support import holds_in_child
from training_run import manager_of, model, path_of, steps_in, train

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks


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


def test_a_pin_that_fails(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that does not say whether the step is pinned now."""

    def fail(self: Any, name: str, *arguments: object) -> None:
        raise CallFailed("openat", name, errno.EROFS, os.strerror(errno.EROFS))

    manager = manager_of(memory)
    train(manager, 1, 10)
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "create", fail)
        with pytest.raises(shardsave.ShardSaveError, match="cannot pin .*Read-only file system; the step is not pinned$"):
            manager.pin(10)
    manager.pin(10)
    monkeypatch.setattr(Directory, "unlink", fail)
    with pytest.raises(shardsave.ShardSaveError, match="cannot unpin .*Read-only file system; the step is pinned$"):
        manager.unpin(10)


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
