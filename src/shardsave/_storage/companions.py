"""Companions: files with fixed names beside the weights that belong to them, such as a model's config.

A companion is put in place whole, and recognised by its checksum in the index. Its name is fixed, so unlike a shard it cannot wait
under a new name for the commit. If its name is free, the companion is linked to it before the commit. If it replaces a file, it
stays in the staging directory until the index is durable. In between, new weights are beside an old config: a reader detects this
by the checksum in the index, and if the saver dies in between, the next save puts the companion in place.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from shardsave._common.os_calls import CallFailed, NotRegular, call
from shardsave._format.crc64 import crc64, joined
from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.permissions import Permissions, permissions_of
from shardsave._storage.staging import Staging, owner_of

#: The configs of a transformers model.
CONFIG_NAMES = ("config.json", "generation_config.json")

#: The files of a PEFT adapter.
ADAPTER_NAMES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS})

#: The files of an adapter of PEFT, also of older versions.
ADAPTER_FILES = (*sorted(ADAPTER_NAMES), "adapter_model.bin")

#: The names of all companions. A save touches no other file with a fixed name, except the index and the lone file.
COMPANION_NAMES = frozenset(CONFIG_NAMES) | ADAPTER_NAMES

#: The largest companion that a save accepts as bytes.
MAX_COMPANION_BYTES = 64_000_000

_STEP = 1 << 20

#: errno values of a staging directory that cannot be entered, and of a name in it that is no regular file.
_NOT_STAGED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EINVAL)


class StagedCompanions:
    """The companions of one save into ``folder``. Those with free names are put in place before the commit, the others after it.

    Every method raises CallFailed.
    """

    def __init__(self, folder: LockedDirectory, staging: Staging) -> None:
        self.linked: set[str] = set()  # companions that are, or may be, in place
        self.links: set[str] = set()  # companions that replace symbolic links
        self._folder = folder
        self._staging = staging
        self._staged: list[str] = []
        self._free: set[str] = set()
        self._permissions: dict[str, Permissions] = {}  # of the companions that are replaced

    def add(self, companions: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Stages files (name → content), except those that are in place already. Returns the records of all files for the index."""
        for name, data in companions.items():
            assert name in COMPANION_NAMES and len(data) <= MAX_COMPANION_BYTES
            if self._is_there(name) and self._is_kept(name, data):
                if (file := self._folder.open_regular(name)) is not None:
                    self._staging.sync_later(file, name)
                continue
            self._staging.make()
            self._staging.write(name, data, self._permissions.get(name))
            self._staged.append(name)
        return {name: FileRecord(len(data), crc64(data)) for name, data in companions.items()}

    def add_second_name(self, shard: str, name: str) -> None:
        """Stages ``name``, a companion's, as a second name of the sealed ``shard``, for readers that look for that name."""
        assert name in COMPANION_NAMES
        self._is_there(name)
        self._staging.add_name(name, shard)
        self._staged.append(name)

    def _is_there(self, name: str) -> bool:
        """Whether a file or a symbolic link has this name. Raises CallFailed if it cannot be replaced."""
        status = self._folder.status_of(name)
        if status is None:
            self._free.add(name)
            return False
        target: os.stat_result | None = status
        if stat.S_ISLNK(status.st_mode):
            self.links.add(name)
            target = self._folder.target_of(name)
        elif not stat.S_ISREG(status.st_mode):
            raise NotRegular(name, status.st_mode)
        self._folder.check_replaceable(name)
        if target is not None and stat.S_ISREG(target.st_mode):
            self._permissions[name] = permissions_of(f"{self._folder.path}/{name}", target)
        return True

    def _is_kept(self, name: str, data: bytes) -> bool:
        """Whether a file with the content ``data`` is in place, and only this user decides whether it stays so."""
        is_certain = name not in self.links and self._folder.obeys(name)
        return is_certain and self._folder.read_all(name, MAX_COMPANION_BYTES) == data

    def link_free(self) -> None:
        """Links the companions whose names are free to these names. No file of another checkpoint has such a name."""
        for name in sorted(self._free):
            self.linked.add(name)  # before the call, because an interrupt may follow it
            if not self._staging.link(name):
                self.linked.remove(name)

    def replacing(self) -> list[str]:
        """The companions that replace files."""
        return [name for name in self._staged if name not in self.linked]


def finish_dead_savers(
    folder: LockedDirectory, companions: Mapping[str, FileRecord], is_dead: Callable[[str], bool]
) -> list[str]:
    """Finishes what savers left to do that died after their commit. Returns the companions that were put in place. Raises CallFailed.

    ``folder`` is locked; ``companions`` are those of its current index. ``is_dead`` says whether the saver of a staging directory is
    dead. Afterwards no staging directory has a committed companion that is in place: cleaning would take it for an uncommitted one
    once an index without companions has replaced the current one.
    """
    finished: list[str] = []
    for staging in sorted(filter(is_dead, folder.names())) if companions else ():
        with Directory(staging, durable=folder.durable) as inside:
            with _if_staged():
                inside.open_in(folder)
            if inside.fd >= 0:
                finished += _finish(folder, companions, inside)
    if finished:
        folder.sync()
    return finished


def _finish(folder: LockedDirectory, companions: Mapping[str, FileRecord], inside: Directory) -> list[str]:
    finished = []
    for name in sorted(COMPANION_NAMES & companions.keys()):
        staged, saved = inside.inode_of(name), companions[name]
        if staged is None:
            continue
        if folder.inode_of(name) == staged:
            inside.unlink(name)
            inside.sync()
        elif not _is_in_place(folder, name, saved) and _is_staged(inside, name, saved):
            folder.check_replaceable(name)
            inside.rename(name, folder, name)
            finished.append(name)
    return finished


def companion_notes(
    path: str, companions: Mapping[str, FileRecord], shards: Iterable[ShardRecord], *, whole: bool
) -> tuple[str, ...]:
    """Says which ``companions`` of the checkpoint in the directory ``path`` are not as they were saved.

    The weights of an adapter are a second name of one of ``shards``. Unless ``whole``, only their header is read, which has the checksum of
    each tensor. These are notes and not errors: the weights are as they were saved, and people edit configs on purpose.
    """
    notes = []
    with Directory() as folder:
        for name, saved in companions.items():
            try:
                if folder.fd < 0:
                    folder.open(path)
                if name == ADAPTER_WEIGHTS and not whole and _has_header(folder, saved, shards):
                    continue
                existing = file_record(folder, name)
                if existing == saved:
                    continue
                difference = "there is none" if existing is None else f"there is one of {_words(existing)}"
                staging = _find_staged(folder, name, saved)
            except CallFailed as error:
                difference, staging = f"it cannot be read ({error.reason})", None
            cause = (
                f"the saved one is still in {staging}, where a save was interrupted"
                if staging
                else "it was edited, or comes from another save"
            )
            notes.append(f"{name} is not the one saved with these weights: {_words(saved)} expected, {difference}; {cause}")
    return tuple(notes)


def _has_header(folder: Directory, saved: FileRecord, shards: Iterable[ShardRecord]) -> bool:
    """Whether the adapter in ``folder`` has the saved length, and the header of one of ``shards`` of that length. Raises CallFailed."""
    file = folder.open_regular(ADAPTER_WEIGHTS)
    if file is None:
        return False
    with file:
        if call(os.fstat, ADAPTER_WEIGHTS, file.fd).st_size != saved.length:
            return False
        alike = {(shard.header_length, shard.header_crc) for shard in shards if shard.length == saved.length}
        return any(crc64(call(os.pread, ADAPTER_WEIGHTS, file.fd, length, 0)) == crc for length, crc in alike)


def file_record(folder: Directory, name: str, *, follow: bool = True) -> FileRecord | None:
    """Length and checksum of the file ``name``; None if there is no such file. Raises CallFailed, NotRegular."""
    file = folder.open_regular(name, follow=follow)
    if file is None:
        return None
    with file:
        length, crc, at = call(os.fstat, name, file.fd).st_size, 0, 0
        while at < length and (part := call(os.pread, name, file.fd, _STEP, at)):
            crc, at = joined(crc, crc64(part), len(part)), at + len(part)
        return FileRecord(length, crc)


def _words(file: FileRecord) -> str:
    return f"{file.length} bytes with checksum {file.crc:016x}"


def _is_in_place(folder: Directory, name: str, saved: FileRecord) -> bool:
    try:
        return file_record(folder, name) == saved
    except CallFailed as error:
        if error.errno != errno.EINVAL:  # not a regular file
            raise
        return False


def _find_staged(folder: Directory, name: str, saved: FileRecord) -> str | None:
    """The name of the staging directory that holds the companion as it was saved; None if there is none."""
    for staging in folder.names():
        if owner_of(staging) is None:
            continue
        with _if_staged(), folder.enter(staging) as inside:
            if _is_staged(inside, name, saved):
                return staging
    return None


def _is_staged(inside: Directory, name: str, saved: FileRecord) -> bool:
    with _if_staged():
        return file_record(inside, name, follow=False) == saved
    return False


@contextmanager
def _if_staged() -> Iterator[None]:
    """Ends the block if a staging directory cannot be entered, or if a name in it is no regular file."""
    try:
        yield
    except CallFailed as error:
        if error.errno not in _NOT_STAGED:
            raise
