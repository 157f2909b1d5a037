"""Opening a checkpoint for reading: from a path to open, checked shards and the place of every tensor in them."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from shardsave._crc64 import crc64
from shardsave._format import Header, parse_header, read_header, read_start
from shardsave._index import INDEX_NAME, LONE_NAME, MAX_INDEX_BYTES, Index, Record, parse_index
from shardsave._json import glimpse
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    IncompatibleCheckpointError,
    ShardSaveError,
)

#: How long a reader starts over while others keep replacing the checkpoint under it, in seconds.
CHANGING_SECONDS = 30.0


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

    def __init__(self, path: str, folder: str, index_name: str, index: Index | None) -> None:
        self.path = path
        self.index = index
        self.tensors: dict[str, Located] = {}
        self.shards: tuple[str, ...] = ()
        self._folder = folder
        self._index_name = index_name
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
            wanted = f"the index names {shard}" if self.index is not None else f"{shard} was expected"
            found = "it is a link to nothing" if os.path.islink(path) else "there is no such file"
            raise CorruptCheckpointError(
                f"corrupt checkpoint {self.path}: {wanted}, {found}; the checkpoint was copied or downloaded in part"
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
        """The header of ``shard``; where the index has a record of it, not a byte is looked at before its checksum is right."""
        where = f"shard {shard}"
        length = os.fstat(descriptor).st_size
        if self.record is None:
            header = parse_header(read_header(descriptor, length, where), length, where)
            if self.index is not None and header.sums is not None:
                raise CorruptCheckpointError(
                    f"corrupt index {self._index_name}: a record of {shard} expected, which shardsave wrote, it has none; "
                    f"one of the two was changed or replaced after it was saved"
                )
            return header
        record = self.record.shards[shard]
        if length != record.length:
            fate = "it was cut, half copied or half downloaded" if length < record.length else "something was appended to it"
            raise CorruptCheckpointError(
                f"corrupt {where}: the index says {record.length} bytes, the file has {length}; {fate}, or belongs to another save"
            )
        raw = read_start(descriptor, record.header_length)
        if (found := crc64(raw)) != record.header_crc:
            raise CorruptCheckpointError(
                f"corrupt {where}: the index says a header with checksum {record.header_crc:016x}, the file has {found:016x}; "
                f"the file was changed after it was saved, or belongs to another save"
            )
        header = parse_header(raw, length, where)
        if header.sums is None:
            raise CorruptCheckpointError(
                f"corrupt {where}: checksums of its tensors expected, as the index has a record of it, its header has none; "
                f"the file was changed after it was saved"
            )
        return header

    def _note_tensors(self, shard: str, header: Header, names: frozenset[str]) -> None:
        held = {tensor.name for tensor in header.tensors}
        if self.index is not None and held != names:
            lacking, surplus = sorted(names - held), sorted(held - names)
            word, name = ("lacks", lacking[0]) if lacking else ("also has", surplus[0])
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says {len(names)} tensors, the file has {len(held)} and {word} "
                f"{glimpse(name)}; index and shard belong to different saves"
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
        found = _find(path)
        try:
            return _open_found(path, found, wanted)
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if not _changed(path, found):
                raise
            if time.monotonic() > deadline:
                raise DirectoryBusyError(
                    f"cannot read {path}: its index was replaced each time while its shards were opened, for "
                    f"{CHANGING_SECONDS:.0f} s; another process keeps saving there"
                ) from None


def _open_found(path: str, found: _Found, wanted: Callable[[str], bool] | None) -> Checkpoint:
    index = parse_index(found.index_bytes, f"index {found.index_name}") if found.index_bytes is not None else None
    if index is not None and found.lone is not None:
        _refuse_unless_superseded(found.folder, index.record, found.lone)
    checkpoint = Checkpoint(path, found.folder, found.index_name, index)
    try:
        if index is not None:
            checkpoint._admit(_shards_to_open(index, wanted))
        elif found.lone is not None:
            checkpoint._admit({found.lone: frozenset()})
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


class _Found(NamedTuple):
    """What a path leads to: an index, a lone file, or both."""

    folder: str
    index_name: str
    index_bytes: bytes | None
    lone: str | None


def _find(path: str) -> _Found:
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error
    folder, name = (path, INDEX_NAME) if is_folder else os.path.split(path)
    if not is_folder and not name.endswith(".index.json"):
        return _Found(folder or ".", INDEX_NAME, None, name)
    index_bytes = _read_index(os.path.join(folder, name), name)
    lone = LONE_NAME if is_folder and _is_there(os.path.join(path, LONE_NAME), even_broken=index_bytes is None) else None
    if index_bytes is None and lone is None:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: neither {name} nor {LONE_NAME} is there{_hint(folder)}")
    return _Found(folder or ".", name, index_bytes, lone)


def _is_there(path: str, even_broken: bool) -> bool:
    """Whether ``path`` leads to something; a link to nothing counts when nothing else is there to be read."""
    return os.path.lexists(path) if even_broken else os.path.exists(path)


def _hint(folder: str) -> str:
    try:
        listed = os.listdir(folder or ".")
    except OSError:
        return ""
    others = sorted(name for name in listed if name.endswith((".safetensors", ".safetensors.index.json")))
    return f"; to read another file, give its path: {', '.join(others[:3])}" if others else ""


def _read_index(path: str, name: str) -> bytes | None:
    descriptor = _open_regular(path, f"index {name}")
    if descriptor is None:
        if os.path.islink(path):
            raise CorruptCheckpointError(
                f"corrupt index {name}: {path}: a regular file was expected, it is a link to nothing; "
                f"the checkpoint was copied or downloaded in part"
            )
        return None
    try:
        length, done = os.fstat(descriptor).st_size, 0
        parts = []
        while length <= MAX_INDEX_BYTES and (part := os.read(descriptor, 1 << 20)):
            parts.append(part)
            done += len(part)
            length = max(length, done)  # some files say 0 and have no end
        if length > MAX_INDEX_BYTES:
            raise CorruptCheckpointError(
                f"corrupt index {name}: at most {MAX_INDEX_BYTES} bytes expected, it has {length}; no shard was opened"
            )
        return b"".join(parts)
    except OSError as error:
        raise _cannot_read(path, error) from error
    finally:
        os.close(descriptor)


def _changed(path: str, seen: _Found) -> bool:
    try:
        return _find(path).index_bytes != seen.index_bytes
    except CheckpointNotFoundError:
        return seen.index_bytes is not None


def _refuse_unless_superseded(folder: str, record: Record | None, lone: str) -> None:
    try:
        found = os.stat(os.path.join(folder, lone))
    except FileNotFoundError:
        return  # just removed by the save that replaced it
    stale = record.supersedes if record is not None else None
    if stale is not None and (stale.size, stale.mtime_ns) == (found.st_size, found.st_mtime_ns):
        return
    raise IncompatibleCheckpointError(
        f"cannot tell which checkpoint is meant: {folder}: one of {INDEX_NAME} and {LONE_NAME} was expected, both are there, "
        f"and the index does not replace the file; give the path of the one to load, or remove the other"
    )


def _open_regular(path: str, what: str) -> int | None:
    """Opens a regular file for reading, through symbolic links; None if there is none.

    Nothing else is even opened: that alone can make a device act, or wake the writer of a FIFO.
    """
    try:
        _refuse_unless_regular(os.stat(path).st_mode, path, what)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(
                f"corrupt {what}: {path}: a regular file was expected, it is a link that leads to itself; it was not read"
            ) from error
        raise _cannot_read(path, error) from error
    try:
        _refuse_unless_regular(os.fstat(descriptor).st_mode, path, what)  # it may have been replaced in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_unless_regular(mode: int, path: str, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise CorruptCheckpointError(
            f"corrupt {what}: {path}: a regular file was expected, it is a {_kind(mode)}; it was not read"
        )


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
