"""The files of a step on disk, and how many of their bytes steps share: by hard links, or by clones of shards (`FICLONE`).

A hard link is the same inode. The bytes of a clone are in use twice, which no system call says; so the index lists the shards that its
save took over, and such a shard shares its bytes with any shard of the same length, header and checksums.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from shardsave._format.file_names import INDEX_NAME
from shardsave._format.index import Record, ShardRecord
from shardsave._storage.directory import Directory

#: Device and inode number.
Inode = tuple[int, int]


class StepFile(NamedTuple):
    """A file: its length; ``names``: how many names of the step it has; ``links``: how many it has in all. ``shard``: its record, if it is
    a shard; ``taken``: whether its save took it over from an earlier checkpoint."""

    bytes: int
    names: int
    links: int
    shard: ShardRecord | None = None
    taken: bool = False


class StepFiles(NamedTuple):
    """The files of a step that are there. ``problem``: what is wrong with them, or ""."""

    files: Mapping[Inode, StepFile]
    problem: str


def files_there(folder: Directory, lengths: Mapping[str, int | None], record: Record) -> StepFiles:
    """The files in ``folder`` with the names in ``lengths`` (file → bytes, None if it may have any), and the index. Raises CallFailed."""
    files: dict[Inode, StepFile] = {}
    problem = ""
    for name, length in {INDEX_NAME: None, **lengths}.items():
        status = folder.target_of(name)
        for found in _statuses(folder, name, status):
            inode = found.st_dev, found.st_ino
            names = files[inode].names + 1 if inode in files else 1
            files[inode] = StepFile(found.st_size, names, found.st_nlink, record.shards.get(name), name in record.shared)
        if length is None or problem:
            continue
        if status is None:
            problem = f"{name} is missing"
        elif status.st_size != length:
            problem = f"{name} was expected to have {length} bytes, it has {status.st_size}"
    return StepFiles(files, problem)


def _statuses(folder: Directory, name: str, status: os.stat_result | None) -> Iterator[os.stat_result]:
    """The status of a file, or of each file in a directory."""
    if status is None or not stat.S_ISDIR(status.st_mode):
        yield from () if status is None else (status,)
        return
    with folder.enter(name) as inside:
        found = [inside.status_of(inner) for inner in inside.names()]
    yield from (inner for inner in found if inner is not None)


class Shared:
    """The files of some steps, of which others may share bytes."""

    def __init__(self) -> None:
        self._inodes: set[Inode] = set()
        self._shards: set[ShardRecord] = set()
        self._taken: set[ShardRecord] = set()

    def add(self, files: Mapping[Inode, StepFile]) -> None:
        self._inodes.update(files)
        self._shards.update(file.shard for file in files.values() if file.shard is not None)
        self._taken.update(file.shard for file in files.values() if file.shard is not None and file.taken)

    def has(self, inode: Inode, file: StepFile) -> bool:
        """Whether these steps have the bytes of ``file``, so that they need no further space."""
        if inode in self._inodes:
            return True
        return file.shard in self._taken or (file.taken and file.shard in self._shards)


def freed_bytes(removed: Iterable[Mapping[Inode, StepFile]], others: Shared) -> int:
    """The bytes that the removal of steps frees: of files that have no further name anywhere, and share no bytes with ``others``."""
    files: dict[Inode, StepFile] = {}
    for step in removed:
        for inode, file in step.items():
            names = files[inode].names if inode in files else 0
            files[inode] = file._replace(names=names + file.names)
    return sum(file.bytes for inode, file in files.items() if file.names >= file.links and not others.has(inode, file))
