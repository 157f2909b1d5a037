"""What may be removed from a directory: what crashed saves left behind, and what a new commit has replaced. Nothing else, ever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shardsave._common.os_calls import CallFailed, Descriptor, call, inode_of, is_regular, read_all
from shardsave._format.file_names import LONE_NAME, OWN_PATTERN
from shardsave._format.index import Index, Superseded
from shardsave._storage.companions import COMPANION_NAMES, remove_replaced_adapter
from shardsave._storage.staging import STAGING_PATTERN

_MAX_LIST_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a save left behind that did not end: its staging directory, or the lone file that it replaced.

    ``files``: what goes with it, relative to the checkpoint's directory. ``bytes``: of disk that this would free.
    ``dead``: whether its owner is known to be gone; of another host nobody here can know that.
    """

    name: str
    files: tuple[str, ...]
    bytes: int
    dead: bool


def clean(
    folder: int, *, own_staging: str, host: str | None, old: Index | None, new: Index, keep_all: bool, durable: bool
) -> tuple[str, ...]:
    """Removes, after a commit of ``new`` in place of ``old``, what neither needs; gives the names that would not go.

    ``folder`` is the locked directory's descriptor; ``host`` is None where there is no lock, and then the staging
    directories of others are left alone. With ``keep_all`` only our own staging directory goes.
    """
    leftovers: list[str] = []
    named = files_of(new)
    if not keep_all:
        for record in (old.record if old is not None else None, new.record):
            if record is not None and record.supersedes is not None and LONE_NAME not in named:
                _remove_lone(folder, record.supersedes, leftovers)
        if old is not None and old.record is not None and new.record is not None:
            leftovers += remove_replaced_adapter(folder, old.record.companions, new.record.companions)
        leftovers += remove_dead_staging(folder, host=host, own_staging=own_staging, named=named, durable=durable)
    replaced = files_of(old) if old is not None and not keep_all else ()
    leftovers += remove_staging(folder, own_staging, finals=replaced, named=named, durable=durable)
    return tuple(dict.fromkeys(leftovers))


def remove_dead_staging(
    folder: int, *, host: str | None, own_staging: str | None, named: frozenset[str], durable: bool
) -> list[str]:
    """Removes what savers of this host left that are gone, as whoever holds the lock knows; gives the names that would not go.

    ``named``: the files of an index that is certain to stay, and those of no other.
    """
    leftovers: list[str] = []
    for name in _listing(folder, leftovers):
        match = STAGING_PATTERN.fullmatch(name)
        if match and match[1] == host and name != own_staging:
            leftovers += remove_staging(folder, name, finals=None, named=named, durable=durable)
    return leftovers


def staging_of_others(folder: int, host: str | None, own_staging: str | None, leftovers: list[str]) -> list[str]:
    """The staging directories of savers that may be alive: of other hosts, or of any where there is no lock."""
    listed = _listing(folder, leftovers)
    matches = [match for name in listed if name != own_staging and (match := STAGING_PATTERN.fullmatch(name))]
    return sorted(match[0] for match in matches if match[1] != host)


def remove_staging(
    folder: int, staging: str, *, finals: Iterable[str] | None, named: frozenset[str], durable: bool
) -> list[str]:
    """Removes a staging directory and the final names that it led to, unless ``named`` (by an index) has them.

    ``finals`` None: as listed in the directory itself. A companion goes from its final name when that is a link to the staged
    one. Gives the names that would not go. The list goes last, and only once it
    is certain that what it lists is gone, so that the next save can take up what ends in the middle of this.
    """
    leftovers: list[str] = []
    with Descriptor() as inside:
        try:
            inside.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
            listed = set(_listed(inside.fd) if finals is None else finals) - named
        except CallFailed as error:
            if error.errno == errno.EACCES:  # made under a mask that took even our own permissions; nothing can be in it
                _attempt(lambda: os.rmdir(staging, dir_fd=folder), staging, leftovers)
                return leftovers
            return [] if error.errno == errno.ENOENT else [staging]
        contents = _listing(inside.fd, leftovers)
        companions = sorted((COMPANION_NAMES & set(contents)) - named)
        _remove(folder, sorted(listed), leftovers)
        for name in companions:
            _attempt(lambda name=name: _unlink_linked(folder, name, inside.fd), name, leftovers)  # type: ignore[misc]
        if (listed or companions) and durable:
            _attempt(lambda: os.fsync(folder), staging, leftovers)
        if leftovers:
            return list(dict.fromkeys([*leftovers, staging]))
        for name in sorted(contents, key=lambda name: name == "names"):
            if _is_staged(name):
                _attempt(lambda name=name: os.unlink(name, dir_fd=inside.fd), f"{staging}/{name}", leftovers)  # type: ignore[misc]
    _attempt(lambda: os.rmdir(staging, dir_fd=folder), staging, leftovers)
    return leftovers


def find_leavings(folder: int, *, host: str | None, index: Index | None) -> tuple[Leaving, ...]:
    """What crashed saves left in the locked directory ``folder`` whose present index is ``index``. Raises CallFailed.

    ``host`` is None where there is no lock, and then no owner is known to be dead.
    """
    named = files_of(index) if index is not None else frozenset()
    kept = {inode for name in named if (inode := inode_of(name, folder)) is not None}
    found = []
    for name in sorted(call(os.listdir, "", folder)):
        match = STAGING_PATTERN.fullmatch(name)
        if match:
            files = _files_with(folder, name, named)
            found.append(Leaving(name, files, _disk_bytes(folder, files, kept), match[1] == host))
    stale = index.record.supersedes if index is not None and index.record is not None else None
    if stale is not None and LONE_NAME not in named and _is_stale(folder, stale):
        found.append(Leaving(LONE_NAME, (LONE_NAME,), _disk_bytes(folder, (LONE_NAME,), kept), True))
    return tuple(found)


def remove_leaving(folder: int, leaving: Leaving, index: Index | None) -> list[str]:
    """Removes ``leaving``, once ``index``, the present one, is certain to stay; gives the names that would not go."""
    named = files_of(index) if index is not None else frozenset()
    if leaving.name != LONE_NAME:
        return remove_staging(folder, leaving.name, finals=None, named=named, durable=True)
    leftovers: list[str] = []
    if index is not None and index.record is not None and index.record.supersedes is not None:
        _remove_lone(folder, index.record.supersedes, leftovers)
    return leftovers


def _files_with(folder: int, staging: str, named: frozenset[str]) -> tuple[str, ...]:
    """What `remove_staging` would remove; nothing where ``staging`` is no directory."""
    with Descriptor() as inside:
        try:
            inside.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
            finals = {name for name in _listed(inside.fd) if OWN_PATTERN.fullmatch(name)} - named
            contents = sorted(call(os.listdir, staging, inside.fd))
            staged = [f"{staging}/{name}" for name in contents if _is_staged(name)]
            finals |= {name for name in COMPANION_NAMES.intersection(contents) - named if _is_linked(folder, name, inside.fd)}
        except CallFailed:
            return ()
    return (*staged, *sorted(name for name in finals if is_regular(name, folder)))


def _disk_bytes(folder: int, files: Iterable[str], kept: set[tuple[int, int]]) -> int:
    """What ``files`` take on disk, each once and without those that stay under another name: shards are moved by links."""
    taken = {}
    for name in files:
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            taken[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(size for inode, size in taken.items() if inode not in kept)


def files_of(index: Index) -> frozenset[str]:
    """The files that ``index`` names."""
    record = index.record
    named = frozenset(index.weight_map.values())
    if record is None:
        return named
    return named | record.shards.keys() | {part.file for part in record.parts.values()} | record.companions.keys()


def _listed(inside: int) -> list[str]:
    """The final names that a dead saver wrote down; none where it did not come so far. Raises CallFailed."""
    data = read_all("names", inside, _MAX_LIST_BYTES, follow=False)
    try:
        names = json.loads(data) if data is not None else []
    except (ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remove(folder: int, names: Iterable[str], leftovers: list[str]) -> None:
    for name in names:
        if OWN_PATTERN.fullmatch(name):
            _attempt(lambda name=name: _unlink_regular(folder, name), name, leftovers)  # type: ignore[misc]


def _unlink_regular(folder: int, name: str) -> None:
    if is_regular(name, folder):
        os.unlink(name, dir_fd=folder)


def _unlink_linked(folder: int, name: str, staging: int) -> None:
    if _is_linked(folder, name, staging):
        os.unlink(name, dir_fd=folder)


def _is_linked(folder: int, name: str, staging: int) -> bool:
    """Whether ``name`` leads to the same file in both directories."""
    return (mine := inode_of(name, staging)) is not None and inode_of(name, folder) == mine


def _is_staged(name: str) -> bool:
    """Whether a saver gives this name to a file in its staging directory."""
    return OWN_PATTERN.fullmatch(name) is not None or name in COMPANION_NAMES or name in ("names", "index")


def _remove_lone(folder: int, stale: Superseded, leftovers: list[str]) -> None:
    def remove() -> None:
        if _is_stale(folder, stale):
            os.unlink(LONE_NAME, dir_fd=folder)

    _attempt(remove, LONE_NAME, leftovers)


def _is_stale(folder: int, stale: Superseded) -> bool:
    """Whether the lone file is the one that was replaced."""
    if not is_regular(LONE_NAME, folder):
        return False
    found = os.stat(LONE_NAME, dir_fd=folder, follow_symlinks=False)
    return (found.st_size, found.st_mtime_ns) == (stale.size, stale.mtime_ns)


def _listing(folder: int, leftovers: list[str]) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        leftovers.append("(the directory could not be listed)")
        return []


def _attempt(action: Callable[[], None], name: str, leftovers: list[str]) -> None:
    try:
        action()
    except FileNotFoundError:
        pass
    except OSError:
        leftovers.append(name)
