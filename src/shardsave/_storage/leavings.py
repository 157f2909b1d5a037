"""Leavings: what crashed saves, and crashed removals of a checkpoint, left in a directory, listed and removed for `clean`."""

from __future__ import annotations

from dataclasses import dataclass

from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import LONE_NAME, REMOVED_INDEX_NAME
from shardsave._format.index import Index
from shardsave._storage.cleanup import (
    Cleaner,
    final_names,
    is_staged,
    is_superseded,
    status_of_final,
)
from shardsave._storage.companions import COMPANION_NAMES
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.previous import files_at, files_of
from shardsave._storage.removal import finish_removal, read_obeyed, removable
from shardsave._storage.sizes import bytes_on_disk, bytes_visible
from shardsave._storage.staging import lists_directory, owner_of, read_list


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a crashed save left behind: its staging directory, or the lone file that it replaced; the index of a checkpoint whose
    removal was interrupted; or the directory of a step, if it is empty.

    ``files``: the files that are removed with it, relative to the checkpoint's directory. ``bytes``: the disk space that this frees.
    ``dead``: whether its saver is known to be dead; False for a saver of another host, whose processes are not visible from here.
    ``ours``: False for what another user may have put into a directory that every user may write to. It is never removed: ``files``
    is empty, and ``bytes`` is what can be seen of it.
    """

    name: str
    files: tuple[str, ...]
    bytes: int
    dead: bool
    ours: bool = True


def find_leavings(folder: LockedDirectory, index: Index | None) -> tuple[Leaving, ...]:
    """What was left in ``folder``, whose present index is ``index``.

    Raises CallFailed, and as `finish_removal` does for an index that names what an interrupted removal has left.
    """
    named = files_of(index)
    leavings = []
    for name in sorted(folder.names()):
        if owner_of(name) is None:
            continue
        if not folder.obeys(name):
            leavings.append(Leaving(name, (), bytes_visible(folder, name), False, ours=False))
            continue
        files = _files_of_staging(folder, name, named)
        leavings.append(Leaving(name, files, bytes_on_disk(folder, files), folder.knows_dead(name)))
    superseded = index.record.supersedes if index is not None and index.record is not None else None
    lone = folder.status_of(LONE_NAME) if superseded is not None and LONE_NAME not in named else None
    if lone is not None and is_superseded(folder, lone, superseded):
        ours = folder.is_ours(lone)
        size = bytes_on_disk(folder, (LONE_NAME,))
        leavings.append(Leaving(LONE_NAME, (LONE_NAME,) if ours else (), size, ours, ours=ours))
    removed = read_obeyed(folder, REMOVED_INDEX_NAME, "clean")
    if removed is not None:
        files = removable(folder, removed, index)
        leavings.append(Leaving(REMOVED_INDEX_NAME, files, bytes_on_disk(folder, files), True))
    return tuple(leavings)


def remove_leaving(folder: LockedDirectory, leaving: Leaving, index: Index | None) -> list[str]:
    """Removes ``leaving``, once the present ``index`` is certain to stay. Returns the names that could not be removed."""
    if leaving.name == REMOVED_INDEX_NAME:
        return list(finish_removal(folder, index).leftovers)
    cleaner = Cleaner(folder)
    if leaving.name != LONE_NAME:
        cleaner.remove_staging(leaving.name, files_of(index))
    elif index is not None:
        cleaner.remove_lone(index)
    return list(cleaner.leftovers)


def _files_of_staging(folder: LockedDirectory, staging: str, named: frozenset[str]) -> tuple[str, ...]:
    """The files that `Cleaner.remove_staging` would remove; none if ``staging`` cannot be read, or stays."""
    try:
        with folder.enter(staging) as inside:
            contents, listed = sorted(inside.names()), read_list(inside)
            if lists_directory(listed):
                return ()
            staged = [f"{staging}/{file}" for name in contents if is_staged(name) for file in files_at(inside, name)]
            statuses = {
                name: status_of_final(folder, name, inside if name in COMPANION_NAMES else None)
                for name in sorted(final_names(listed, contents, named))
            }
        finals = [name for name, status in statuses.items() if status is not None and folder.is_ours(status)]
        return (*staged, *(file for name in finals for file in files_at(folder, name)))
    except CallFailed:
        return ()
