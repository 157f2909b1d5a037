"""What a save may delete: every removal from a checkpoint's directory is in this file.

1. Its own staging directory; if nothing was committed, also the final names that it has given to its files.
2. The staging directories of dead savers of this host, and the final names in their lists.
3. After the commit, the files that the replaced index names: shards, architecture, program, extra tensors.
4. After the commit, the lone file and the adapter that it replaced, unless they have changed since.

Nothing else, ever. Final names are removed only if a save can have given them (`OWN_PATTERN` or a companion's name), if they are regular
files, and if the current index does not name them. Symbolic links are not followed. Replaced files are removed only once the new
index is certain to stay: with ``durable``, once it is durable.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, ParamSpec

from shardsave._common.os_calls import CallFailed
from shardsave._format.file_names import LONE_NAME, OWN_PATTERN
from shardsave._format.index import FileRecord, Index, Superseded
from shardsave._storage.companions import ADAPTER_NAMES, COMPANION_NAMES, file_record
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.previous import Previous, companions_of, files_of
from shardsave._storage.staging import LIST_NAME, NEW_INDEX_NAME, owner_of, read_list

_P = ParamSpec("_P")


class Cleaned(NamedTuple):
    """``leftovers``: names that could not be removed. ``foreign``: staging directories that stay because their savers may be alive."""

    leftovers: tuple[str, ...]
    foreign: tuple[str, ...]


def clean_after_commit(folder: LockedDirectory, own_staging: str, previous: Previous, new: Index) -> Cleaned:
    """Removes what the new index does not need; ``new`` was just committed in place of ``previous``.

    If the replaced index cannot be read, only this save's staging directory is removed: nobody knows what the other files are.
    """
    names, leftovers = _names_in(folder)
    foreign = sorted(name for name in names if name != own_staging and owner_of(name) and not folder.knows_dead(name))
    named = files_of(new)
    if not previous.unreadable:
        for index in (previous.index, new):
            leftovers += remove_superseded(folder, index, named)
        leftovers += _remove_replaced_adapter(folder, previous.companions, companions_of(new))
        leftovers += remove_dead_staging(folder, named, own_staging)
    leftovers += remove_staging(folder, own_staging, named, finals=previous.files)
    return Cleaned(tuple(dict.fromkeys(leftovers)), tuple(foreign))


def remove_dead_staging(folder: LockedDirectory, named: frozenset[str], own_staging: str = "") -> list[str]:
    """Removes what dead savers of this host left. ``named``: the files of an index that is certain to stay.

    Returns the names that could not be removed.
    """
    names, leftovers = _names_in(folder)
    for name in names:
        if name != own_staging and folder.knows_dead(name):
            leftovers += remove_staging(folder, name, named)
    return leftovers


def remove_staging(folder: Directory, staging: str, named: frozenset[str], *, finals: Iterable[str] | None = None) -> list[str]:
    """Removes a staging directory and the final names of its files, except the files that an index names (``named``).

    ``finals``: the final names; without it, those in the directory's own list. A companion's final name is removed if it is a link to
    the staged file. The list is removed last, and only once the final names are certain to be gone, so that the next save can finish
    an interrupted removal. Returns the names that could not be removed.
    """
    with Directory(staging, durable=folder.durable) as inside:
        try:
            inside.open_in(folder)
            listed = set(read_list(inside) if finals is None else finals) - named
        except CallFailed as error:
            if error.errno == errno.EACCES:  # created under a umask that denies even its owner; it is empty
                return _leftover(staging, folder.rmdir, staging)
            return [] if error.errno == errno.ENOENT else [staging]
        contents, leftovers = _names_in(inside)
        companions = COMPANION_NAMES.intersection(contents) - named
        for name in sorted(filter(OWN_PATTERN.fullmatch, listed)):
            leftovers += _leftover(name, _unlink_regular, folder, name)
        for name in sorted(companions):
            leftovers += _leftover(name, _unlink_linked, folder, name, inside)
        if listed or companions:
            leftovers += _leftover(staging, folder.sync)
        if leftovers:
            return list(dict.fromkeys([*leftovers, staging]))
        for name in sorted(filter(is_staged, contents), key=LIST_NAME.__eq__):  # the list comes last
            leftovers += _leftover(f"{staging}/{name}", inside.unlink, name)
    return leftovers + _leftover(staging, folder.rmdir, staging)


def remove_superseded(folder: Directory, index: Index | None, named: frozenset[str]) -> list[str]:
    """Removes the lone file that ``index`` says it replaced. Returns the names that could not be removed."""
    superseded = index.record.supersedes if index is not None and index.record is not None else None
    if superseded is None or LONE_NAME in named:
        return []
    return _leftover(LONE_NAME, _unlink_superseded, folder, superseded)


def _remove_replaced_adapter(folder: Directory, old: Mapping[str, FileRecord], new: Mapping[str, FileRecord]) -> list[str]:
    """Removes adapter files among the replaced companions ``old`` that are not in ``new``, unless they changed since they were saved.

    Other libraries would otherwise find that adapter and apply it to the new weights.
    """
    leftovers = []
    for name in sorted(ADAPTER_NAMES & (old.keys() - new.keys())):
        leftovers += _leftover(name, _unlink_unchanged, folder, name, old[name])
    return leftovers


def is_staged(name: str) -> bool:
    """Whether a saver gives this name to a file in its staging directory."""
    return OWN_PATTERN.fullmatch(name) is not None or name in COMPANION_NAMES or name in (LIST_NAME, NEW_INDEX_NAME)


def is_linked(folder: Directory, name: str, inside: Directory) -> bool:
    """Whether ``name`` is the same file in both directories."""
    inode = inside.inode_of(name)
    return inode is not None and folder.inode_of(name) == inode


def is_superseded(folder: Directory, superseded: Superseded) -> bool:
    """Whether the lone file is the one that was replaced."""
    if not folder.is_regular(LONE_NAME):
        return False
    status = folder.status_of(LONE_NAME)
    return status is not None and (status.st_size, status.st_mtime_ns) == superseded


def _unlink_regular(folder: Directory, name: str) -> None:
    if folder.is_regular(name):
        folder.unlink(name)


def _unlink_linked(folder: Directory, name: str, inside: Directory) -> None:
    if is_linked(folder, name, inside):
        folder.unlink(name)


def _unlink_superseded(folder: Directory, superseded: Superseded) -> None:
    if is_superseded(folder, superseded):
        folder.unlink(LONE_NAME)


def _unlink_unchanged(folder: Directory, name: str, saved: FileRecord) -> None:
    if file_record(folder, name, follow=False) == saved:
        folder.unlink(name)


def _names_in(folder: Directory) -> tuple[list[str], list[str]]:
    """The names in a directory; and if it cannot be listed, what to report as a leftover."""
    try:
        return folder.names(), []
    except CallFailed:
        return [], ["(the directory could not be listed)"]


def _leftover(name: str, action: Callable[_P, None], *arguments: _P.args, **options: _P.kwargs) -> list[str]:
    """Runs ``action``. Returns ``[name]`` if it failed, an empty list if it succeeded or the file was gone already."""
    try:
        action(*arguments, **options)
    except CallFailed as error:
        return [name] if error.errno != errno.ENOENT else []
    return []
