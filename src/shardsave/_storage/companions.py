"""Companions: files of fixed names beside the weights that belong to them, such as a model's config.

A companion is put in place whole, and recognised by its checksum in the index. Its name is fixed, so unlike a shard it cannot wait
under a new name for the index to mention it. If its name is free, it gets it before the commit; if it replaces a file, it waits in
the staging directory until the index is durable. In between, new weights lie beside an old config: a reader notices by the checksum
in the index, and the next save finishes what a dead saver left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from shardsave._common.os_calls import CallFailed, call
from shardsave._format.crc64 import crc64, joined
from shardsave._format.index import FileRecord
from shardsave._storage.directory import Directory
from shardsave._storage.staging import Staging, owner_of

#: The configs of a transformers model.
CONFIG_NAMES = ("config.json", "generation_config.json")

#: The files of a PEFT adapter.
ADAPTER_NAMES = frozenset({"adapter_config.json", "adapter_model.safetensors"})

#: The only names that are put beside weights, replaced or removed.
COMPANION_NAMES = frozenset(CONFIG_NAMES) | ADAPTER_NAMES

#: The longest companion that is passed as bytes.
MAX_COMPANION_BYTES = 64_000_000

_STEP = 1 << 20

#: errno values that mean "no such file in a staging directory", or no staging directory that can be entered.
_NOT_STAGED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EINVAL)


class StagedCompanions:
    """The companions of one save into ``folder``. Those whose names are free get them before the commit, the others after it.

    Every method raises CallFailed.
    """

    def __init__(self, folder: Directory, staging: Staging) -> None:
        self.linked: set[str] = set()  # those that have, or may have, their final names
        self._folder = folder
        self._staging = staging
        self._staged: list[str] = []
        self._free: set[str] = set()

    def add(self, companions: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Stages files, name → content, except those that lie there already. Returns the index's records of all of them."""
        for name, data in companions.items():
            assert name in COMPANION_NAMES and len(data) <= MAX_COMPANION_BYTES
            existing = self._folder.read_all(name, MAX_COMPANION_BYTES)
            if existing == data:
                self._folder.sync_file(name)
                continue
            if existing is None:
                self._free.add(name)
            self._staging.make()
            self._staging.write(name, data)
            self._staged.append(name)
        return {name: FileRecord(len(data), crc64(data)) for name, data in companions.items()}

    def add_second_name(self, shard: str, name: str) -> None:
        """Stages ``name`` for the content of the sealed ``shard``, for readers that look for it under that name."""
        assert name in COMPANION_NAMES
        if self._folder.inode_of(name) is None:
            self._free.add(name)
        self._staging.add_name(name, shard)
        self._staged.append(name)

    def link_free(self) -> None:
        """Gives companions whose names are free their names: no file is there that belongs to another checkpoint."""
        for name in sorted(self._free):
            self.linked.add(name)  # before the call, which an interrupt may follow
            if not self._staging.link(name):
                self.linked.remove(name)

    def replacing(self) -> list[str]:
        """The companions that replace files."""
        return [name for name in self._staged if name not in self.linked]


def finish_dead_savers(folder: Directory, companions: Mapping[str, FileRecord], is_dead: Callable[[str], bool]) -> None:
    """Puts companions in place that a saver left staged when it died between its commit and here. Raises CallFailed.

    ``folder`` is locked, ``companions`` are those of the index that is there. ``is_dead`` says of a staging directory whether its
    saver is dead.
    """
    finished = False
    for name in sorted(COMPANION_NAMES & companions.keys()):
        saved = companions[name]
        staging = None if _is_in_place(folder, name, saved) else _find_staged(folder, name, saved)
        if staging is not None and is_dead(staging):
            with folder.enter(staging) as inside:
                inside.rename(name, folder, name)
            finished = True
    if finished:
        folder.sync()


def companion_notes(path: str, companions: Mapping[str, FileRecord]) -> tuple[str, ...]:
    """Says which ``companions`` of the checkpoint in the directory ``path`` are not as they were saved.

    Notes and not errors: the weights are as they were saved, and a config is a text that people edit on purpose.
    """
    notes = []
    with Directory() as folder:
        for name, saved in companions.items():
            try:
                if folder.fd < 0:
                    folder.open(path)
                existing = file_record(folder, name)
                if existing == saved:
                    continue
                difference = "there is none" if existing is None else f"there is one of {_words(existing)}"
                staging = _find_staged(folder, name, saved)
            except CallFailed as error:
                difference, staging = f"it cannot be read ({error.reason})", None
            cause = (
                f"the saved one lies in {staging}, where a save was interrupted"
                if staging
                else "it was edited, or comes from another save"
            )
            notes.append(f"{name} is not the one saved with these weights: {_words(saved)} expected, {difference}; {cause}")
    return tuple(notes)


def file_record(folder: Directory, name: str, *, follow: bool = True) -> FileRecord | None:
    """Length and checksum of the file ``name``, None where there is none. Raises CallFailed, NotRegular."""
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
    """The staging directory that holds the companion as it was saved."""
    for staging in folder.names():
        if owner_of(staging) is None:
            continue
        try:
            with folder.enter(staging) as inside:
                staged = file_record(inside, name, follow=False)
        except CallFailed as error:
            if error.errno in _NOT_STAGED:
                continue
            raise
        if staged == saved:
            return staging
    return None
