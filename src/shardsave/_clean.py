"""What may be removed from a directory: what crashed saves left behind, and what a new commit has replaced. Nothing else, ever."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable

from shardsave._files import CallFailed, Descriptor, is_regular, read_all
from shardsave._index import LONE_NAME, OWN_PATTERN, Index, Superseded

#: Staging directories: eight hex digits for the host, eight at random.
STAGING_PATTERN = re.compile(r"\.shardsave-([0-9a-f]{8})[0-9a-f]{8}")

_MAX_LIST_BYTES = 64_000_000


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


def remove_staging(
    folder: int, staging: str, *, finals: Iterable[str] | None, named: frozenset[str], durable: bool
) -> list[str]:
    """Removes a staging directory and the final names that it led to, unless ``named`` (by an index) has them.

    ``finals`` None: as listed in the directory itself. Gives the names that would not go. The list goes last, and only once it
    is certain that what it lists is gone, so that the next save can take up what ends in the middle of this.
    """
    leftovers: list[str] = []
    with Descriptor() as inside:
        try:
            inside.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
            listed = set(_listed(inside.fd) if finals is None else finals) - named
        except CallFailed as error:
            return [] if error.errno == errno.ENOENT else [staging]
        _remove(folder, sorted(listed), leftovers)
        if listed and durable:
            _attempt(lambda: os.fsync(folder), staging, leftovers)
        if leftovers:
            return list(dict.fromkeys([*leftovers, staging]))
        contents = _listing(inside.fd, leftovers)
        for name in sorted(contents, key=lambda name: name == "names"):
            if OWN_PATTERN.fullmatch(name) or name in ("names", "index"):
                _attempt(lambda name=name: os.unlink(name, dir_fd=inside.fd), f"{staging}/{name}", leftovers)  # type: ignore[misc]
    _attempt(lambda: os.rmdir(staging, dir_fd=folder), staging, leftovers)
    return leftovers


def files_of(index: Index) -> frozenset[str]:
    """The files that ``index`` names."""
    named = frozenset(index.weight_map.values())
    return named | index.record.shards.keys() | {part.file for part in index.record.parts.values()} if index.record else named


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


def _remove_lone(folder: int, stale: Superseded, leftovers: list[str]) -> None:
    def remove() -> None:
        if is_regular(LONE_NAME, folder):
            found = os.stat(LONE_NAME, dir_fd=folder, follow_symlinks=False)
            if (found.st_size, found.st_mtime_ns) == (stale.size, stale.mtime_ns):
                os.unlink(LONE_NAME, dir_fd=folder)

    _attempt(remove, LONE_NAME, leftovers)


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
