"""Files beside the weights that belong to them, such as a model's config: put in place whole, and known again by their checksum.

Their names are fixed, so unlike shards they cannot wait under a new name for the index to name them. One whose name is free gets
it before the commit; one that others are to be replaced by waits in the staging directory until the index is durable. Between the
two, new weights lie beside an old config: whoever reads can tell by the checksum in the index, and the next save finishes what a
dead saver left.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping

from shardsave._crc64 import crc64, joined
from shardsave._files import CallFailed, Descriptor, call, open_regular
from shardsave._index import FileRecord

#: The only names that are put beside weights, replaced or removed.
COMPANION_NAMES = frozenset({"config.json", "generation_config.json", "adapter_config.json", "adapter_model.safetensors"})

#: Staging directories: eight hex digits for the host, eight at random.
STAGING_PATTERN = re.compile(r"\.shardsave-([0-9a-f]{8})[0-9a-f]{8}")

#: What is given as bytes is at most this long.
MAX_COMPANION_BYTES = 64_000_000

_STEP = 1 << 20


def record_of(data: bytes) -> FileRecord:
    """What the index says of a companion with this content."""
    return FileRecord(len(data), crc64(data))


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
