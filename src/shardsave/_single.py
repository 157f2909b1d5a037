"""One file made of tensors, safetensors' or torch's own: written beside its place under another name, and moved there whole."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch

from shardsave import _engine
from shardsave._backend import engine_name
from shardsave._dtypes import BY_TORCH, logical_shape
from shardsave._files import CallFailed, Descriptor, allocate, call, make_folders, write_all
from shardsave._format import encode_header, with_sums
from shardsave._plan import ALIGNMENT, Extent, StoredTensor, blocks, pack
from shardsave._state import Entry
from shardsave.errors import DurabilityUncertainError, OutOfSpaceError, SaveNotCommittedError, ShardSaveError

#: The most that a tick covers where torch writes, in bytes.
_STEP = 8 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class Written(NamedTuple):
    """How a file was written, for the report."""

    direct: bool
    staging_bytes: int
    engine: str
    notes: tuple[str, ...] = ()


class NewFile:
    """A file on its way to ``path``: left without a commit, it is removed, and what was at ``path`` is as it was."""

    def __init__(self, path: str, durable: bool) -> None:
        self.path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self.folder, self._name = os.path.split(self.path)
        self.scratch = f".{self._name[:100]}.{secrets.token_hex(8)}.part"
        self.file = Descriptor()
        self._durable = durable
        self._directory = Descriptor()
        self._there = False
        self._moved = False

    def __enter__(self) -> NewFile:
        try:
            make_folders(self.folder, self._durable)
            self._directory.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            self._there = True
            self.file.open(self.scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, self._directory.fd)
        except CallFailed as error:
            self.close()
            raise self.failure(error) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def commit(self) -> None:
        """Makes the file durable where that was asked for, and gives it its name."""
        try:
            if self._durable:
                call(os.fsync, self.path, self.file.fd)
            self.file.close(self.path)
            folders = {"src_dir_fd": self._directory.fd, "dst_dir_fd": self._directory.fd}
            call(os.rename, self.path, self.scratch, self._name, **folders)
            self._moved = True
        except CallFailed as error:
            raise self.failure(error) from error
        if self._durable:
            try:
                call(os.fsync, self.folder, self._directory.fd)
            except CallFailed as error:
                raise DurabilityUncertainError(
                    f"written, but not known to be durable: {self.path}: {error.call} of {error.path}: {error.strerror}, once the "
                    f"file had its name; a loss of power may bring back what was there before"
                ) from error

    def failure(self, error: CallFailed) -> ShardSaveError:
        kind = OutOfSpaceError if error.errno in _NO_ROOM else SaveNotCommittedError
        return kind(
            f"cannot write {self.path}: {error.call}: {error.strerror}; nothing was written, what was there is as it was"
        )

    def close(self) -> None:
        self.file.abandon()
        if self._there and not self._moved:
            with suppress(OSError):
                os.unlink(self.scratch, dir_fd=self._directory.fd)
        self._directory.abandon()


def write_safetensors(
    path: str, entries: Sequence[Entry], metadata: Mapping[str, str], durable: bool, tick: Callable[[int], object]
) -> Written:
    """One safetensors file with all of ``entries``; of tied ones the first, the others named in its metadata."""
    stored = [entry for entry in entries if entry.tied_to is None]
    (shard,) = pack([_stored(entry) for entry in stored], sys.maxsize)
    header = encode_header(shard, {**metadata, **{entry.name: entry.tied_to for entry in entries if entry.tied_to is not None}})
    by_name = {entry.name: entry for entry in stored}
    pieces = [
        _engine.Piece(by_name[t.name].tensor, by_name[t.name].cast or by_name[t.name].tensor.dtype, t.nbytes)
        for t in shard.tensors
    ]
    extents = [
        Extent(0, len(header) + begin, tensor.nbytes, at, 1)
        for at, (tensor, begin) in enumerate(zip(shard.tensors, shard.begins))
    ]
    planned = blocks(extents, _engine.BLOCK_BYTES)
    with NewFile(path, durable) as new:
        try:
            allocate(new.file.fd, path, len(header) + -(-shard.data_bytes // ALIGNMENT) * ALIGNMENT)
            done = _engine.write([new.file.fd], planned, pieces, direct=durable, tick=tick)
            call(os.ftruncate, path, new.file.fd, len(header) + shard.data_bytes)
            _buffered(new.file.fd, path)
            write_all(new.file.fd, path, with_sums(header, done.sums))
        except _engine.TransferFault as fault:
            raise new.failure(CallFailed(fault.call, path, fault.errno, str(fault))) from fault
        except CallFailed as error:
            raise new.failure(error) from error
        new.commit()
    return Written(all(done.direct), done.staging_bytes, engine_name(), done.notes)


def _buffered(fd: int, path: str) -> None:
    """The header is no whole number of blocks."""
    flags = call(fcntl.fcntl, path, fd, fcntl.F_GETFL)
    call(fcntl.fcntl, path, fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _stored(entry: Entry) -> StoredTensor:
    dtype = entry.cast or entry.tensor.dtype
    return StoredTensor(entry.name, BY_TORCH[dtype].name, logical_shape(entry.tensor), entry.tensor.numel() * dtype.itemsize)


class _Sink:
    """What torch.save writes into: a new file, in steps, so that whoever waits is told and what was read can be let go."""

    def __init__(self, new: NewFile, tick: Callable[[int], object]) -> None:
        self.failed: BaseException | None = None  # torch raises another error over it
        self._new, self._tick, self._done = new, tick, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        try:
            while at < len(view):
                at += call(os.write, self._new.path, self._new.file.fd, view[at : at + _STEP])
                self._tick(self._done + at)
        except BaseException as error:
            self.failed = error
            raise
        self._done += at
        return at

    def flush(self) -> None:
        pass


def write_torch(path: str, entries: Sequence[Entry], durable: bool, tick: Callable[[int], object]) -> Written:
    """One file of torch.save, with a plain dict from names to tensors; tied ones share a storage in it, too.

    Each tensor of ``entries`` must lie in memory as it is to lie in the file: `fits_torch`.
    """
    state: dict[str, torch.Tensor] = {}
    for entry in entries:
        assert fits_torch(entry) and isinstance(entry.tensor, torch.Tensor)
        state[entry.name] = state[entry.tied_to] if entry.tied_to is not None else _with_own_storage(entry.tensor)
    with NewFile(path, durable) as new:
        sink = _Sink(new, tick)
        try:
            torch.save(state, sink)  # type: ignore[arg-type]
        except BaseException:
            if isinstance(sink.failed, CallFailed):
                raise new.failure(sink.failed) from sink.failed
            if sink.failed is not None:
                raise sink.failed from None
            raise
        new.commit()
    return Written(False, _STEP, "torch")


def fits_torch(entry: Entry) -> bool:
    """Whether torch.save would write this tensor as it lies in memory, and nothing else with it."""
    tensor = entry.tensor
    if entry.cast is not None or not isinstance(tensor, torch.Tensor):
        return False
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor whose storage has nothing else in it: torch.save writes whole storages."""
    storage, begin = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    length = tensor.numel() * tensor.element_size()
    own = storage[begin : begin + length]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
