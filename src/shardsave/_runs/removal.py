"""Removes a step from its run, and makes the steps that stay durable before any other goes. Pins are looked at under the step's lock."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import INDEX_NAME, REMOVED_INDEX_NAME, step_name
from shardsave._runs.steps import PIN_NAME, Run
from shardsave._storage.cleanup import Cleaner
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory, learn_owner
from shardsave._storage.previous import files_of
from shardsave._storage.removal import finish_removal, read_obeyed, remove_checkpoint, remove_if_empty, undo_begun
from shardsave.errors import CheckpointNotFoundError, ShardSaveError


class RemovedStep(NamedTuple):
    """``bytes``: the disk space of its files. ``leftovers``: names in its directory that stay, since they are not the step's, or could
    not be removed. ``pinned``: whether nothing was removed, because the step is pinned."""

    step: int
    path: str
    bytes: int = 0
    leftovers: tuple[str, ...] = ()
    pinned: bool = False


def remove_step(run: str, step: int) -> RemovedStep:
    """Removes the files of a step, what died saves left beside them, and the directory if it is empty then.

    Raises DirectoryBusyError if someone uses the step, ShardSaveError for what cannot be done. An interrupted removal is
    finished by `finish_step`.
    """
    path = os.path.join(run, step_name(step))
    _refuse_link(path)
    with _locked(path) as folder:
        if folder.status_of(PIN_NAME) is not None:
            return RemovedStep(step, path, pinned=True)
        removed = remove_checkpoint(folder)
        if not removed.failed:
            Cleaner(folder).remove_dead_staging(frozenset())
        return RemovedStep(step, path, removed.bytes, removed.leftovers or _remove_directory(run, step))


def finish_step(run: str, step: int) -> RemovedStep:
    """Finishes the interrupted removal of a step, and removes what a died first save left, with the directory if it is empty then.

    Where a checkpoint is in place, it stays. Raises as `remove_step` does.
    """
    path = os.path.join(run, step_name(step))
    _refuse_link(path)
    with _locked(path) as folder:
        undo_begun(folder)
        index = read_obeyed(folder, INDEX_NAME)
        removed = finish_removal(folder, index)
        if index is not None:
            return RemovedStep(step, path, removed.bytes, removed.leftovers)
        Cleaner(folder).remove_dead_staging(files_of(index))
        return RemovedStep(step, path, removed.bytes, removed.leftovers or _remove_directory(run, step))


def _refuse_link(path: str) -> None:
    if os.path.islink(path):
        raise ShardSaveError(f"cannot remove {path}: a directory was expected, it is a symbolic link; what it leads to stays")


def _remove_directory(run: str, step: int) -> tuple[str, ...]:
    with Directory(durable=True) as above:
        above.open(run)
        return remove_if_empty(above, step_name(step))


def make_durable(run: Run, step: int) -> None:
    """Makes a step durable that another process may have committed a moment before it died, or without waiting for the disk.

    Raises ShardSaveError.
    """
    path = run.path_of(step)
    try:
        with Directory(durable=True) as folder, Directory(durable=True) as above:
            folder.open(path)
            for name in run.files_to_sync(step):
                _sync(folder, name)
            folder.sync_file(INDEX_NAME)
            folder.sync()
            above.open(run.path)
            above.sync()
    except CallFailed as error:
        why = f"{error.words}; no step was removed"
        if error.errno == errno.ENOENT and not os.path.lexists(os.path.join(path, INDEX_NAME)):
            why = f"another process has removed it meanwhile, one process was expected to remove steps of {run.path}; this one removed none"
        raise ShardSaveError(f"cannot make {path} durable: {why}") from error


def _sync(folder: Directory, name: str) -> None:
    """Makes a file durable, or a directory of files."""
    status = folder.status_of(name)
    if status is None or not stat.S_ISDIR(status.st_mode):
        return folder.sync_file(name)
    with folder.enter(name) as inside:
        for inner in inside.names():
            inside.sync_file(inner)
        inside.sync()


def pin(run: str, step: int) -> None:
    """Marks a step, under its lock, so that no policy removes it. Raises CheckpointNotFoundError, ShardSaveError."""
    path = os.path.join(run, step_name(step))
    with _locked(path, 60.0, "pin") as folder:
        if folder.status_of(INDEX_NAME, follow=True) is None:
            raise CheckpointNotFoundError(f"cannot pin {path}: a committed step was expected, there is no {INDEX_NAME}")
        try:
            with Descriptor() as file:
                folder.create(PIN_NAME, file)
                folder.sync_open(file.fd, PIN_NAME)
        except CallFailed as error:
            if error.errno != errno.EEXIST:
                raise
        folder.sync()


def unpin(run: str, step: int) -> None:
    """Removes the mark of `pin`, if there is one. Raises CheckpointNotFoundError, ShardSaveError."""
    path = os.path.join(run, step_name(step))
    with _locked(path, 60.0, "unpin") as folder:
        if folder.status_of(PIN_NAME) is not None:
            folder.unlink(PIN_NAME)
            folder.sync()


@contextmanager
def _locked(path: str, timeout: float = 0.0, purpose: str = "remove") -> Iterator[LockedDirectory]:
    """The directory at ``path``, with its lock, and in a shared directory with its owner."""
    folder = LockedDirectory(path, durable=True)
    # Closed twice, since one interrupt may come at the beginning of a `close`, which then does nothing.
    with closing(folder), folder:
        try:
            folder.acquire(timeout, purpose=purpose, state="nothing was changed")
            learn_owner(folder)
            yield folder
        except CallFailed as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and folder.fd < 0:
                raise CheckpointNotFoundError(f"cannot {purpose} {path}: {error.reason}; there is no such step") from error
            raise ShardSaveError(f"cannot {purpose} {path}: {error.words}; {_state(folder, purpose)}") from error


def _state(folder: LockedDirectory, purpose: str) -> str:
    """What is true after a call failed, for a message."""
    try:
        if folder.status_of(REMOVED_INDEX_NAME) is not None:
            return "its removal has begun, and can be finished later"
        if purpose in ("pin", "unpin"):
            return "the step is pinned" if folder.status_of(PIN_NAME) is not None else "the step is not pinned"
    except CallFailed:
        pass
    return "the step stays"
