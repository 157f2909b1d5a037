"""Removes a whole checkpoint from its directory, so that at any moment it is there, whole, or is no checkpoint any more.

1. The index gets a second name, and the directory is synced; so a loss of power cannot lose the list of what is to go.
2. The index loses its own name, and the directory is synced: from here on there is no checkpoint. Neither needs space on a full disk.
3. The files that it names are removed (`cleanup.py`), and the directory is synced.
4. The second name of the index is removed last. If the process ends before that, it still says which files are to go.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import INDEX_NAME, REMOVED_INDEX_NAME
from shardsave._format.index import MAX_INDEX_BYTES, Index
from shardsave._format.index_parsing import parse_index
from shardsave._storage.cleanup import Cleaner, final_names
from shardsave._storage.directory import NO_LINKS, Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.previous import files_at, files_of
from shardsave._storage.sizes import bytes_on_disk
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError


class RemovedCheckpoint(NamedTuple):
    """``bytes``: the disk space that the removed files had. ``leftovers``: names of files that stay. ``failed``: whether some of them
    could not be removed, so that the removal is not finished."""

    bytes: int = 0
    leftovers: tuple[str, ...] = ()
    failed: bool = False


def remove_checkpoint(folder: LockedDirectory) -> RemovedCheckpoint:
    """Removes the checkpoint in ``folder``, which is locked, and what an interrupted removal has left there.

    Raises CallFailed; CorruptCheckpointError, IncompatibleCheckpointError or ShardSaveError if nobody knows which files belong to it:
    nothing was removed then.
    """
    undo_begun(folder)
    index = read_obeyed(folder, INDEX_NAME)
    earlier = finish_removal(folder, index)
    if index is None or earlier.failed:
        return earlier
    _move_index(folder)
    removed = finish_removal(folder, None)
    leftovers = tuple(dict.fromkeys([*earlier.leftovers, *removed.leftovers]))
    return RemovedCheckpoint(earlier.bytes + removed.bytes, leftovers, removed.failed)


def finish_removal(folder: LockedDirectory, index: Index | None) -> RemovedCheckpoint:
    """Finishes the removal that was begun in ``folder``, if there is one. ``index``: the one in place, whose files stay.

    `undo_begun` was called before that index was read.

    Raises as `remove_checkpoint` does.
    """
    removed = read_obeyed(folder, REMOVED_INDEX_NAME)
    if removed is None:
        return RemovedCheckpoint()
    folder.sync()  # the index is gone for good, whoever removed it, before a file that it names goes
    named = files_of(index)
    size = bytes_on_disk(folder, removable(folder, removed, index))
    cleaner = Cleaner(folder)
    cleaner.remove_files_of(removed, named)
    if not cleaner.failed:
        folder.sync()
        folder.unlink(REMOVED_INDEX_NAME)
    return RemovedCheckpoint(size, tuple(cleaner.leftovers), cleaner.failed)


def _move_index(folder: LockedDirectory) -> None:
    try:
        folder.link(INDEX_NAME, folder, REMOVED_INDEX_NAME)
    except CallFailed as error:
        if error.errno not in NO_LINKS:
            raise
        folder.rename(INDEX_NAME, folder, REMOVED_INDEX_NAME)
    else:
        folder.sync()
        folder.unlink(INDEX_NAME)


def undo_begun(folder: LockedDirectory) -> None:
    """Drops the second name of an index that has its own name too: its removal had not begun to take effect."""
    inode = folder.inode_of(REMOVED_INDEX_NAME)
    if inode is not None and inode == folder.inode_of(INDEX_NAME):
        folder.unlink(REMOVED_INDEX_NAME)


def removable(folder: Directory, removed: Index, index: Index | None) -> tuple[str, ...]:
    """The files in ``folder`` that go with the index ``removed``, that index itself too."""
    files: list[str] = []
    for name in (REMOVED_INDEX_NAME, *sorted(final_names(files_of(removed), (), files_of(index)))):
        with suppress(CallFailed):
            files += (file for file in files_at(folder, name) if folder.status_of(file) is not None)
    return tuple(files)


def read_obeyed(folder: LockedDirectory, name: str, purpose: str = "remove the checkpoint in") -> Index | None:
    """The index in the file ``name``, None if there is no such file. ``purpose``: what cannot be done without it, for the message.

    Raises CallFailed; ShardSaveError, CorruptCheckpointError or IncompatibleCheckpointError for one that must not be obeyed.
    """
    data = folder.read_all(name, MAX_INDEX_BYTES)
    if data is None:
        return None
    if not folder.obeys(name):
        raise ShardSaveError(
            f"cannot {purpose} {folder.path}: a {name} that only this user can have written was expected, since everybody may write "
            f"to this directory; another user made it, or may have changed it; nothing was removed"
        )
    try:
        return parse_index(data, f"index {name}")
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        raise type(error)(
            f"cannot {purpose} {folder.path}: an index that names its files was expected, {name} cannot be read ({error}); nothing "
            f"was removed"
        ) from error


def remove_if_empty(folder: Directory, name: str) -> tuple[str, ...]:
    """Removes the directory ``name`` in ``folder``, durably. Returns the names in it if it is not empty. Raises CallFailed."""
    try:
        folder.rmdir(name)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return ()
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        with folder.enter(name) as inside:
            return tuple(sorted(inside.names()))
    folder.sync()
    return ()
