"""The checkpoint that was in a directory before a save."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from shardsave._common.os_calls import CallFailed, NotRegular, call
from shardsave._format.file_names import ADAPTER_WEIGHTS, DIRECTORY_PATTERN, INDEX_NAME, LONE_NAME, is_in_directory
from shardsave._format.index import MAX_INDEX_BYTES, FileRecord, Index, Superseded
from shardsave._format.index_parsing import parse_index
from shardsave._format.rank_files import is_rank_file
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.permissions import Permissions, Replaced, common_permissions, permissions_of
from shardsave._storage.rank_files import has_chunks
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

#: errno values of a name that is no directory which can be entered.
_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)


@dataclass(frozen=True)
class Previous:
    """An index, a lone file, both, or nothing.

    ``index_bytes``: the content of the index file. ``unreadable``: why ``index`` is None although that file exists. ``lone``: None
    also for a symbolic link to nothing. ``links``: which of the index and the lone file are symbolic links. ``not_ours``: an index
    that another user may have written, which is not obeyed; ``index`` is None then. ``strangers_index``: whether the index file belongs to
    another user of a shared directory. ``ranks``: files of several ranks that torch wrote: name → what changes when the file does; None
    if it cannot be opened, so that nobody knows what it is.
    """

    index_bytes: bytes | None = None
    index: Index | None = None
    unreadable: str = ""
    lone: Superseded | None = None
    links: frozenset[str] = frozenset()
    not_ours: Index | None = None
    strangers_index: bool = False
    ranks: Mapping[str, Superseded | None] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        return self.index_bytes is not None or self.lone is not None or bool(self.ranks)

    @property
    def has_lone(self) -> bool:
        """Whether something has the name of the lone file."""
        return self.lone is not None or LONE_NAME in self.links

    @property
    def others_index(self) -> bool:
        """Whether there is an index that another user made, or that shardsave did not write."""
        index = self.index or self.not_ours
        return self.strangers_index or (self.index_bytes is not None and (index is None or index.record is None))

    @property
    def files(self) -> frozenset[str]:
        """The files that the index names, and the directories of parts."""
        return files_of(self.index)

    @property
    def companions(self) -> Mapping[str, FileRecord]:
        return companions_of(self.index)

    def notes(self, removed: Collection[str]) -> list[str]:
        """What the report of a save says about the checkpoint that it replaced. ``removed``: the names of removed files."""
        notes = []
        lone_is_gone = LONE_NAME in removed
        if any(name in removed for name in self.ranks):
            notes.append("files of several ranks, which were not saved by shardsave, were replaced")
        if self.unreadable:
            notes.append(f"nothing was removed that the replaced index names, since {self.unreadable}")
        record = self.index.record if self.index is not None else None
        if lone_is_gone and (record is None or record.supersedes != self.lone):
            notes.append(f"{LONE_NAME}, which was not saved by shardsave, was replaced")
        elif self.index is not None and record is None:
            notes.append("the checkpoint that was replaced was not saved by shardsave")
        return notes


def read_previous(folder: LockedDirectory) -> Previous:
    """Reads the checkpoint that is in ``folder``. Raises CallFailed."""
    lone, links = folder.status_of(LONE_NAME), set()
    if lone is not None and stat.S_ISLNK(lone.st_mode):
        links.add(LONE_NAME)
        lone = folder.target_of(LONE_NAME)
    status = folder.status_of(INDEX_NAME)
    if status is not None and stat.S_ISLNK(status.st_mode):
        links.add(INDEX_NAME)
    strangers_index = status is not None and not folder.is_ours(status)
    superseded = Superseded(lone.st_size, lone.st_mtime_ns) if lone is not None else None
    content = folder.read_all(INDEX_NAME, MAX_INDEX_BYTES)
    ranks = _read_ranks(folder)
    previous = Previous(content, lone=superseded, links=frozenset(links), strangers_index=strangers_index, ranks=ranks)
    if previous.index_bytes is None:
        return previous
    try:
        index = parse_index(previous.index_bytes, f"index {INDEX_NAME}")
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        return replace(previous, unreadable=f"it cannot be read ({error})")
    if not folder.obeys(INDEX_NAME):
        return replace(previous, unreadable="another user of this directory made it, or may have changed it", not_ours=index)
    return replace(previous, index=index)


def permissions_replaced(folder: LockedDirectory, previous: Previous) -> Replaced:
    """The permissions for new files in the place of ``previous``, which all of its files of the same kind have. Raises CallFailed."""
    index = _permissions_of(folder, [INDEX_NAME]) if previous.index_bytes is not None else None
    weights = [*sorted(previous.files - previous.companions.keys()), LONE_NAME, ADAPTER_WEIGHTS]
    files = _permissions_of(folder, weights) or index
    folders = sorted(filter(DIRECTORY_PATTERN.fullmatch, previous.files))
    in_folders = [f"{name}/{file}" for name in folders for file in files_in_directory(folder, name)]
    return Replaced(
        files=files,
        index=index or files,
        folder=_permissions_of(folder, folders, stat.S_ISDIR) or (files.of_folder() if files is not None else None),
        in_folder=_permissions_of(folder, in_folders) or files,
    )


def _permissions_of(
    folder: LockedDirectory, names: Iterable[str], kind: Callable[[int], bool] = stat.S_ISREG
) -> Permissions | None:
    """What all of ``names`` allow, or what links of these names lead to, if it is of this ``kind``."""
    statuses = {name: folder.target_of(name) for name in names}
    return common_permissions(
        permissions_of(f"{folder.path}/{name}", status)
        for name, status in statuses.items()
        if status is not None and kind(status.st_mode)
    )


def files_in_directory(folder: Directory, name: str) -> list[str]:
    """The names of a part's files in its directory ``name``; none if that is no directory, or a symbolic link to one. Raises CallFailed."""
    try:
        with folder.enter(name) as inside:
            return sorted(filter(is_in_directory, inside.names()))
    except CallFailed as error:
        if error.errno not in _NO_DIRECTORY:
            raise
        return []


def files_at(folder: Directory, name: str) -> list[str]:
    """``name`` itself; or, if it is the directory of a part, the files in it that a save may have written. Raises CallFailed."""
    status = folder.status_of(name) if DIRECTORY_PATTERN.fullmatch(name) else None
    if status is None or not stat.S_ISDIR(status.st_mode):
        return [name]
    return [f"{name}/{file}" for file in files_in_directory(folder, name)]


def _read_ranks(folder: LockedDirectory) -> dict[str, Superseded | None]:
    """The files of several ranks in ``folder``: those that have such a name and say which chunks they hold."""
    ranks: dict[str, Superseded | None] = {}
    for name in sorted(filter(is_rank_file, folder.names())):
        try:
            file = folder.open_regular(name)
            if file is None:
                continue
            with file:
                status = call(os.fstat, name, file.fd)
                if has_chunks(file.fd, name):
                    ranks[name] = Superseded(status.st_size, status.st_mtime_ns)
        except NotRegular:
            continue
        except CallFailed:
            ranks[name] = None
    return ranks


def files_of(index: Index | None) -> frozenset[str]:
    """The files that ``index`` names, and the directories of parts."""
    if index is None:
        return frozenset()
    named = frozenset(index.weight_map.values())
    record = index.record
    if record is None:
        return named
    return (
        named
        | record.shards.keys()
        | {part.directory or part.file for part in record.parts.values()}
        | record.companions.keys()
    )


def companions_of(index: Index | None) -> Mapping[str, FileRecord]:
    """The companions that ``index`` names."""
    return index.record.companions if index is not None and index.record is not None else {}
