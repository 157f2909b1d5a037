"""What may be removed from a directory: what crashed saves left behind, and what a new commit has replaced. Nothing else, ever."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable

from shardsave._files import is_regular, read_all
from shardsave._index import LONE_NAME, SHARD_PATTERN, Index, Superseded

#: Staging directories: eight hex digits for the host, eight at random.
STAGING_PATTERN = re.compile(r"\.shardsave-([0-9a-f]{8})[0-9a-f]{8}")

_MAX_LIST_BYTES = 64_000_000


def clean(
    folder: int, *, own_staging: str | None, host: str | None, old: Index | None, new: Index, keep_all: bool
) -> tuple[str, ...]:
    """Removes, after a commit of ``new`` in place of ``old``, what neither needs; gives the names that would not go.

    ``folder`` is the locked directory's descriptor; ``host`` is None where there is no lock, and then the staging
    directories of others are left alone. With ``keep_all`` only our own staging directory goes.
    """
    leftovers: list[str] = []
    named = files_of(new)
    if not keep_all:
        _remove(folder, sorted(files_of(old) - named if old is not None else ()), leftovers)
        for record in (old.record if old is not None else None, new.record):
            if record is not None and record.supersedes is not None and LONE_NAME not in named:
                _remove_lone(folder, record.supersedes, leftovers)
        for name in _listing(folder, leftovers):
            match = STAGING_PATTERN.fullmatch(name)
            if match and match[1] == host and name != own_staging:
                leftovers += remove_staging(folder, name, finals=None, named=named)
    if own_staging is not None and leftovers:
        leftovers.append(own_staging)  # its list names what would not go
    elif own_staging is not None:
        leftovers += remove_staging(folder, own_staging, finals=(), named=named)
    return tuple(dict.fromkeys(leftovers))


def remove_staging(folder: int, staging: str, *, finals: Iterable[str] | None, named: frozenset[str]) -> list[str]:
    """Removes a staging directory and the final names that it led to, unless ``named`` (by an index) has them.

    ``finals`` None: as listed in the directory itself. Gives the names that would not go; the list goes last, so that what
    is interrupted here can be taken up by the next save.
    """
    leftovers: list[str] = []
    try:
        inside = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return leftovers
    except OSError:
        return [staging]
    try:
        listed = _listed(inside) if finals is None else finals
        _remove(folder, sorted(set(listed) - named), leftovers)
        if leftovers:
            return [*leftovers, staging]  # the list stays, so that the next save can go on from it
        contents = _listing(inside, leftovers)
        for name in sorted(contents, key=lambda name: name == "names"):
            if SHARD_PATTERN.fullmatch(name) or name in ("names", "index"):
                _attempt(lambda name=name: os.unlink(name, dir_fd=inside), f"{staging}/{name}", leftovers)  # type: ignore[misc]
    finally:
        _attempt(lambda: os.close(inside), staging, leftovers)
    _attempt(lambda: os.rmdir(staging, dir_fd=folder), staging, leftovers)
    return leftovers


def files_of(index: Index) -> frozenset[str]:
    """The files that ``index`` names."""
    return frozenset(index.weight_map.values()) | frozenset(index.record.shards if index.record is not None else ())


def _listed(inside: int) -> list[str]:
    """The final names that a dead saver wrote down; none where it did not come so far."""
    try:
        data = read_all("names", inside, _MAX_LIST_BYTES)
        names = json.loads(data) if data is not None else []
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _remove(folder: int, names: Iterable[str], leftovers: list[str]) -> None:
    for name in names:
        if SHARD_PATTERN.fullmatch(name):
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
