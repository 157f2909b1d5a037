"""Leavings: what crashed saves left in a directory, listed and removed for `clean`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import LONE_NAME, OWN_PATTERN
from shardsave._format.index import Index
from shardsave._storage.cleanup import is_linked, is_staged, is_superseded, remove_staging, remove_superseded
from shardsave._storage.companions import COMPANION_NAMES
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.previous import files_of
from shardsave._storage.staging import owner_of, read_list


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a crashed save left behind: its staging directory, or the lone file that it replaced.

    ``files``: the files that are removed with it, relative to the checkpoint's directory. ``bytes``: the disk space that this frees.
    ``dead``: whether its saver is known to be dead; False for a saver of another host, whose processes are not visible from here.
    """

    name: str
    files: tuple[str, ...]
    bytes: int
    dead: bool


def find_leavings(folder: LockedDirectory, index: Index | None) -> tuple[Leaving, ...]:
    """What crashed saves left in ``folder``, whose present index is ``index``. Raises CallFailed."""
    named = files_of(index)
    kept = {inode for name in named if (inode := folder.inode_of(name)) is not None}
    leavings = []
    for name in sorted(folder.names()):
        if owner_of(name) is not None:
            files = _files_of_staging(folder, name, named)
            leavings.append(Leaving(name, files, _disk_bytes(folder, files, kept), folder.knows_dead(name)))
    superseded = index.record.supersedes if index is not None and index.record is not None else None
    if superseded is not None and LONE_NAME not in named and is_superseded(folder, superseded):
        leavings.append(Leaving(LONE_NAME, (LONE_NAME,), _disk_bytes(folder, (LONE_NAME,), kept), True))
    return tuple(leavings)


def remove_leaving(folder: LockedDirectory, leaving: Leaving, index: Index | None) -> list[str]:
    """Removes ``leaving``, once the present ``index`` is certain to stay. Returns the names that could not be removed."""
    named = files_of(index)
    if leaving.name == LONE_NAME:
        return remove_superseded(folder, index, named)
    return remove_staging(folder, leaving.name, named)


def _files_of_staging(folder: Directory, staging: str, named: frozenset[str]) -> tuple[str, ...]:
    """The files that `remove_staging` would remove; none if ``staging`` is not a readable directory."""
    try:
        with folder.enter(staging) as inside:
            finals = set(filter(OWN_PATTERN.fullmatch, read_list(inside))) - named
            contents = sorted(inside.names())
            staged = [f"{staging}/{name}" for name in contents if is_staged(name)]
            finals |= {name for name in COMPANION_NAMES.intersection(contents) - named if is_linked(folder, name, inside)}
    except CallFailed:
        return ()
    return (*staged, *sorted(filter(folder.is_regular, finals)))


def _disk_bytes(folder: Directory, files: Iterable[str], kept: set[tuple[int, int]]) -> int:
    """The disk space that removing ``files`` frees: each inode counts once, since a link may give it two names; ``kept`` inodes do not."""
    sizes = {}
    for name in files:
        with suppress(CallFailed):
            status = folder.status_of(name)
            if status is not None:
                sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(size for inode, size in sizes.items() if inode not in kept)
