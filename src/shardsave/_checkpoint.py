"""Opening a checkpoint for reading: from a path to open, checked shards and the place of every tensor in them."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from shardsave._crc64 import crc64
from shardsave._format import Header, read_header
from shardsave._index import INDEX_NAME, LONE_NAME, Index, Record, parse_index
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    IncompatibleCheckpointError,
    ShardSaveError,
)

#: How long a reader starts over while others keep replacing the checkpoint under it, in seconds.
CHANGING_SECONDS = 30.0

#: An index larger than this is refused unread, in bytes (the Hub's own bound is 10 MB).
MAX_INDEX_BYTES = 512_000_000


@dataclass(frozen=True, slots=True)
class Located:
    """Where a stored tensor lies: ``offset`` bytes into the file ``shard``; ``checksum`` is None where none was stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int
    checksum: int | None


class Checkpoint:
    """A checkpoint held open. Its descriptors keep the bytes readable even when a save replaces the files meanwhile."""

    def __init__(self, path: str, folder: str, index: Index | None) -> None:
        self.path = path
        self.index = index
        self.tensors: dict[str, Located] = {}
        self.shards: tuple[str, ...] = ()
        self._folder = folder
        self._open: dict[str, int] = {}

    @property
    def record(self) -> Record | None:
        return self.index.record if self.index is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        return self.record.ties if self.record is not None else {}

    @property
    def flags(self) -> Mapping[str, bool] | None:
        return self.record.flags if self.record is not None else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.record.metadata if self.record is not None else {}

    def path_of(self, shard: str) -> str:
        """The path of ``shard``, for messages and for those who open it themselves."""
        return os.path.join(self._folder, shard)

    def descriptor(self, shard: str) -> int:
        """An open descriptor of ``shard``; where it had to be closed for want of descriptors, opened and checked again."""
        if shard not in self._open:
            self._open[shard], _ = self._open_shard(shard)
        return self._open[shard]

    def release(self, shard: str) -> None:
        """Closes ``shard`` when more shards are in use than descriptors can be held for."""
        if len(self.shards) > descriptor_allowance() and shard in self._open:
            os.close(self._open.pop(shard))

    @property
    def stored_names(self) -> Iterable[str]:
        """The names under which bytes are stored, in the order of the index, whether or not their shard was opened."""
        return self.index.weight_map if self.index is not None else self.tensors

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _admit(self, shards: Mapping[str, frozenset[str]]) -> None:
        """Opens ``shards`` (file → the names that the index says it holds) and notes where their tensors lie."""
        allowance = descriptor_allowance()
        self.shards = tuple(shards)
        for shard, names in shards.items():
            descriptor, header = self._open_shard(shard)
            if len(self._open) < allowance:
                self._open[shard] = descriptor
            else:
                os.close(descriptor)
            self._note_tensors(shard, header, names)

    def _open_shard(self, shard: str) -> tuple[int, Header]:
        path = self.path_of(shard)
        descriptor = _open_regular(path, f"shard {shard}")
        if descriptor is None:
            raise CorruptCheckpointError(
                f"corrupt checkpoint {self.path}: the index names {shard}, there is no such file; "
                f"the checkpoint was copied or downloaded in part"
            )
        try:
            return descriptor, self._checked_header(descriptor, shard)
        except OSError as error:
            os.close(descriptor)
            raise _cannot_read(path, error) from error
        except BaseException:
            os.close(descriptor)
            raise

    def _checked_header(self, descriptor: int, shard: str) -> Header:
        where = f"shard {shard}"
        length = os.fstat(descriptor).st_size
        record = self.record.shards[shard] if self.record is not None else None
        if record is not None and length != record.length:
            raise CorruptCheckpointError(
                f"corrupt {where}: the index says {record.length} bytes, the file has {length}; "
                f"it was cut, half copied or changed after it was saved"
            )
        header, raw = read_header(descriptor, length, where)
        if record is not None:
            found = crc64(raw)
            if len(raw) != record.header_length or found != record.header_crc:
                raise CorruptCheckpointError(
                    f"corrupt {where}: the index says a header of {record.header_length} bytes with checksum "
                    f"{record.header_crc:016x}, the file has {len(raw)} bytes with {found:016x}; "
                    f"the file was changed after it was saved, or belongs to another save"
                )
            if header.sums is None:
                raise CorruptCheckpointError(f"corrupt {where}: its header has no checksums, though the index has our record")
        elif self.index is not None and header.sums is not None:
            raise CorruptCheckpointError(
                f"corrupt index {INDEX_NAME}: {where} was written by shardsave, and the index has no record of that; "
                f"one of them was changed after it was saved"
            )
        return header

    def _note_tensors(self, shard: str, header: Header, names: frozenset[str]) -> None:
        held = {tensor.name for tensor in header.tensors}
        if self.index is not None and held != names:
            lacking, surplus = sorted(names - held), sorted(held - names)
            word, name = ("lacks", lacking[0]) if lacking else ("also has", surplus[0])
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says {len(names)} tensors, the file {word} {name!r}; "
                f"index and shard belong to different saves"
            )
        sums = header.sums or [None] * len(header.tensors)
        for tensor, checksum in zip(header.tensors, sums):
            self.tensors[tensor.name] = Located(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                tensor.end - tensor.begin,
                shard,
                header.data_start + tensor.begin,
                checksum,
            )


def open_checkpoint(path: str | os.PathLike[str], wanted: Callable[[str], bool] | None = None) -> Checkpoint:
    """Opens what is at ``path``: a directory, an index or one safetensors file, written by us or by others.

    With ``wanted`` only the shards that hold a wanted tensor are opened, but whole shards are listed.
    Starts over while the index changes under it. Raises CheckpointNotFoundError, CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError.
    """
    path = os.fspath(path)
    deadline = time.monotonic() + CHANGING_SECONDS
    while True:
        folder, index_bytes, lone = _find(path)
        try:
            return _open_found(path, folder, index_bytes, lone, wanted)
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if not _changed(path, index_bytes):
                raise
            if time.monotonic() > deadline:
                raise DirectoryBusyError(
                    f"cannot read {path}: its index was replaced each time while its shards were opened, for "
                    f"{CHANGING_SECONDS:.0f} s; another process keeps saving there"
                ) from None


def _open_found(
    path: str, folder: str, index_bytes: bytes | None, lone: str | None, wanted: Callable[[str], bool] | None
) -> Checkpoint:
    index = parse_index(index_bytes, f"index {INDEX_NAME}") if index_bytes is not None else None
    if index is not None and lone is not None:
        _refuse_unless_superseded(folder, index.record, lone)
    checkpoint = Checkpoint(path, folder, index)
    try:
        if index is not None:
            checkpoint._admit(_shards_to_open(index, wanted))
        elif lone is not None:
            checkpoint._admit({lone: frozenset()})
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _shards_to_open(index: Index, wanted: Callable[[str], bool] | None) -> dict[str, frozenset[str]]:
    named: dict[str, set[str]] = {shard: set() for shard in (index.record.shards if index.record is not None else ())}
    for name, shard in index.weight_map.items():
        named.setdefault(shard, set()).add(name)
    if wanted is not None:
        ties = index.record.ties if index.record is not None else {}
        needed = {shard for name, shard in index.weight_map.items() if wanted(name)}
        needed.update(index.weight_map[stored] for name, stored in ties.items() if wanted(name))
        named = {shard: names for shard, names in named.items() if shard in needed}
    return {shard: frozenset(names) for shard, names in named.items()}


def _find(path: str) -> tuple[str, bytes | None, str | None]:
    """The folder, the content of the index, and the name of a lone file, of what ``path`` names."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error
    if not is_folder:
        folder, name = os.path.split(path)
        if name.endswith(".index.json"):
            return folder or ".", _read_index(path), None
        return folder or ".", None, name
    index_bytes = _read_index(os.path.join(path, INDEX_NAME))
    lone = LONE_NAME if os.path.lexists(os.path.join(path, LONE_NAME)) else None
    if index_bytes is None and lone is None:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: neither {INDEX_NAME} nor {LONE_NAME} is there{_hint(path)}")
    return path, index_bytes, lone


def _hint(folder: str) -> str:
    others = sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", ".safetensors.index.json")))
    return f"; to read another file, give its path: {', '.join(others[:3])}" if others else ""


def _read_index(path: str) -> bytes | None:
    descriptor = _open_regular(path, f"index {os.path.basename(path)}")
    if descriptor is None:
        return None
    try:
        length = os.fstat(descriptor).st_size
        if length > MAX_INDEX_BYTES:
            raise CorruptCheckpointError(f"corrupt index {path}: at most {MAX_INDEX_BYTES} bytes expected, it has {length}")
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise _cannot_read(path, error) from error
    finally:
        os.close(descriptor)


def _changed(path: str, seen: bytes | None) -> bool:
    try:
        return _find(path)[1] != seen
    except CheckpointNotFoundError:
        return seen is not None


def _refuse_unless_superseded(folder: str, record: Record | None, lone: str) -> None:
    found = os.stat(os.path.join(folder, lone))
    stale = record.supersedes if record is not None else None
    if stale is not None and (stale.size, stale.mtime_ns) == (found.st_size, found.st_mtime_ns):
        return
    raise IncompatibleCheckpointError(
        f"cannot tell which checkpoint is meant: {folder}: one of {INDEX_NAME} and {LONE_NAME} was expected, both are there, "
        f"and the index does not replace the file; give the path of the one to load, or remove the other"
    )


def _open_regular(path: str, what: str) -> int | None:
    """Opens a regular file for reading, through symbolic links, without waiting on a FIFO or a device; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise CorruptCheckpointError(f"corrupt {what}: {path}: a regular file was expected: {error.strerror}") from error
        raise _cannot_read(path, error) from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise CorruptCheckpointError(f"corrupt {what}: {path}: a regular file was expected, it is a {_kind(mode)}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _cannot_read(path: str, error: OSError) -> ShardSaveError:
    return ShardSaveError(f"cannot read {path}: {error.strerror}; the files on disk are as they were")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def descriptor_allowance() -> int:
    """How many shards may be held open: half of the limit of this process, so that the rest of it can go on."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (soft if soft != resource.RLIM_INFINITY else 1 << 16) // 2)
