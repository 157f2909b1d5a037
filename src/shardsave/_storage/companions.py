"""Files beside the weights that belong to them, such as a model's config: put in place whole, and known again by their checksum.

Their names are fixed, so unlike shards they cannot wait under a new name for the index to name them. One whose name is free gets
it before the commit; one that others are to be replaced by waits in the staging directory until the index is durable. Between the
two, new weights lie beside an old config: whoever reads can tell by the checksum in the index, and the next save finishes what a
dead saver left.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

from shardsave._common.os_calls import CallFailed, Descriptor, call, inode_of, open_regular, read_all
from shardsave._format.crc64 import crc64, joined
from shardsave._format.index import FileRecord
from shardsave._storage.staging import NO_LINKS, STAGING_PATTERN, Staging, sync_there

#: The configs of a transformers model.
CONFIG_NAMES = ("config.json", "generation_config.json")

#: What PEFT's adapters are.
ADAPTER_NAMES = frozenset({"adapter_config.json", "adapter_model.safetensors"})

#: The only names that are put beside weights, replaced or removed.
COMPANION_NAMES = frozenset(CONFIG_NAMES) | ADAPTER_NAMES

#: What is given as bytes is at most this long.
MAX_COMPANION_BYTES = 64_000_000

_STEP = 1 << 20


class StagedCompanions:
    """The companions of one save, staged. Those whose names are free get them before the commit, the others wait for it.

    Every method raises CallFailed. ``folder`` is the locked directory's descriptor.
    """

    def __init__(self, staging: Staging, *, durable: bool) -> None:
        self.linked: set[str] = set()  # those that have their names
        self._staging = staging
        self._durable = durable
        self._staged: list[str] = []
        self._free: set[str] = set()

    def add(self, companions: Mapping[str, bytes], folder: int) -> dict[str, FileRecord]:
        """Stages files, name → content, except those that lie there already; what the index says of all of them."""
        for name, data in companions.items():
            assert name in COMPANION_NAMES and len(data) <= MAX_COMPANION_BYTES
            there = read_all(name, folder, MAX_COMPANION_BYTES)
            if there == data:
                sync_there(name, folder, wanted=self._durable)
                continue
            if there is None:
                self._free.add(name)
            self._staging.make(folder)
            self._staging.write(name, data)
            self._staged.append(name)
        return {name: FileRecord(len(data), crc64(data)) for name, data in companions.items()}

    def add_second_name(self, shard: str, name: str, folder: int) -> None:
        """Stages ``name`` for the content of the sealed ``shard``: where other readers look for it."""
        assert name in COMPANION_NAMES
        if inode_of(name, folder) is None:
            self._free.add(name)
        self._staging.add_name(name, shard)
        self._staged.append(name)

    def link_free(self, folder: int) -> None:
        """Gives those their names whose names are free: nothing that is there can be taken for a part of another checkpoint."""
        for name in sorted(self._free):
            self.linked.add(name)
            try:
                self._staging.link(name, folder)
            except CallFailed as error:
                if error.errno not in (errno.EEXIST, *NO_LINKS):
                    raise
                self.linked.remove(name)

    def replacing(self) -> list[str]:
        """Those that take the place of others."""
        return [name for name in self._staged if name not in self.linked]


def finish_dead_savers(folder: int, companions: Mapping[str, FileRecord], is_dead: Callable[[str], bool]) -> bool:
    """Puts in place what a saver left staged that died between its commit and here; whether there was any.

    ``folder`` is the locked directory's descriptor, ``companions`` are those of the index that is there, and ``is_dead`` tells whether
    the owner of a staging directory is gone. Raises CallFailed.
    """
    done = False
    for name in sorted(COMPANION_NAMES & companions.keys()):
        staging = None if _is_there(name, folder, companions[name]) else _staged(name, folder, companions[name])
        if staging is not None and is_dead(staging):
            with Descriptor() as inside:
                inside.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
                call(os.rename, name, name, name, src_dir_fd=inside.fd, dst_dir_fd=folder)
            done = True
    return done


def remove_replaced_adapter(folder: int, old: Mapping[str, FileRecord], new: Mapping[str, FileRecord]) -> list[str]:
    """Removes the adapter of the checkpoint that was replaced by one without; gives the names that would not go.

    Only what is still as it was saved. Other libraries would go on to find it, and put it on the new weights.
    """
    leftovers = []
    for name in sorted(ADAPTER_NAMES & (old.keys() - new.keys())):
        try:
            if _file_record(name, folder, follow=False) == old[name]:
                call(os.unlink, name, name, dir_fd=folder)
        except CallFailed:
            leftovers.append(name)
    return leftovers


def companion_notes(path: str, companions: Mapping[str, FileRecord]) -> tuple[str, ...]:
    """What the reader of a checkpoint in the directory ``path`` should know of its companions: those that are not as saved.

    A note and no error: the weights are what was saved, and a config is a text that people edit on purpose.
    """
    notes = []
    with Descriptor() as folder:
        for name, saved in companions.items():
            try:
                if folder.fd < 0:
                    folder.open(path, os.O_RDONLY | os.O_DIRECTORY)
                there = _file_record(name, folder.fd)
                if there == saved:
                    continue
                found = "there is none" if there is None else _words(there)
                staging = _staged(name, folder.fd, saved)
            except CallFailed as error:
                found, staging = f"it cannot be read ({error.call}: {error.strerror})", None
            why = (
                f"that one lies in {staging}, where a save was ended"
                if staging
                else "it was edited, or comes from another save"
            )
            notes.append(f"{name} is not the one saved with these weights: {_words(saved)} expected, {found}; {why}")
    return tuple(notes)


def _words(file: FileRecord) -> str:
    return f"{file.length} bytes with checksum {file.crc:016x}"


def _is_there(name: str, folder: int, saved: FileRecord) -> bool:
    try:
        return _file_record(name, folder) == saved
    except CallFailed as error:
        if error.errno == errno.EINVAL:  # no regular file
            return False
        raise


def _file_record(name: str, folder: int, *, follow: bool = True) -> FileRecord | None:
    """Of the file that lies there; None where there is none. Raises CallFailed."""
    with Descriptor() as file:
        if not open_regular(file, name, folder, follow=follow):
            return None
        length, crc, at = call(os.fstat, name, file.fd).st_size, 0, 0
        while at < length and (part := call(os.pread, name, file.fd, _STEP, at)):
            crc, at = joined(crc, crc64(part), len(part)), at + len(part)
        return FileRecord(length, crc)


def _staged(name: str, folder: int, saved: FileRecord) -> str | None:
    """The staging directory that holds the companion as it was saved."""
    for staging in call(os.listdir, "", folder):
        if STAGING_PATTERN.fullmatch(staging):
            with Descriptor() as inside:
                try:
                    inside.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, folder)
                    there = _file_record(name, inside.fd, follow=False)
                except CallFailed as error:
                    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EINVAL):
                        continue
                    raise
            if there == saved:
                return staging
    return None
