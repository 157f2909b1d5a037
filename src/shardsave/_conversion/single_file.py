"""Writes one file of tensors: a safetensors file or a file of torch.save."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from shardsave._common.backend import engine_name
from shardsave._common.os_calls import CallFailed, allocate, call
from shardsave._common.sources import TensorSource
from shardsave._conversion.new_file import NewFile
from shardsave._engine import engine
from shardsave._engine.transfer import Access, TransferFault
from shardsave._format.header import CHECKSUM_KEY, with_sums
from shardsave._saving.packings import plan_shards
from shardsave._saving.shards import plan_blocks
from shardsave._state.module import Entry
from shardsave._storage.staging import end_shard
from shardsave.errors import UnsupportedTensorError

#: The most bytes between two ticks while torch writes.
_STEP = 8 << 20


class WriteResult(NamedTuple):
    """How the output was written, for the report. ``removed``: names of files that were removed or replaced.

    ``leftovers``: names of files that should have been removed and could not be. ``warned``: whether a warning was issued.
    """

    direct: bool
    staging_bytes: int
    engine: str
    notes: tuple[str, ...] = ()
    shards: int = 1
    removed: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    warned: bool = False


def write_safetensors(
    new: NewFile, entries: Sequence[Entry], metadata: Mapping[str, str], durable: bool, tick: Callable[[int], object]
) -> WriteResult:
    """Writes ``entries`` into ``new`` as a safetensors file. Of tied tensors only the first is stored; the metadata names the rest."""
    stored = [entry for entry in entries if entry.tied_to is None]
    ties = {entry.name: entry.tied_to for entry in entries if entry.tied_to is not None}
    if reserved_names := sorted(ties.keys() & {"format", CHECKSUM_KEY}):
        raise UnsupportedTensorError(
            f"cannot write {new.path}: the metadata of the file names tied tensors, but {reserved_names[0]!r} has another meaning "
            f"there; rename it, or convert to a directory; nothing was written"
        )
    (shard,) = plan_shards(stored, None, apart=False, more={**metadata, **ties})
    fd, path = new.file.fd, new.path
    try:
        allocate(fd, path, shard.reserved_bytes)
        access: Access = "direct" if durable else "buffered"
        transfer = engine.write([fd], plan_blocks([shard]), shard.pieces, access=access, start_writeback=durable, tick=tick)
        end_shard(fd, path, len(shard.header) + shard.layout.data_bytes, with_sums(shard.header, transfer.sums))
    except TransferFault as fault:
        raise new.failure(CallFailed(fault.call, path, fault.errno, str(fault))) from fault
    except CallFailed as error:
        raise new.failure(error) from error
    new.commit()
    return WriteResult(all(transfer.direct), transfer.staging_bytes, engine_name(), transfer.notes)


class _Sink:
    """The file object for torch.save. Writes in steps, between which progress is reported and pages of the source are released."""

    def __init__(self, new: NewFile, tick: Callable[[int], object]) -> None:
        self.error: BaseException | None = None  # torch raises another error in its place
        self._new, self._tick, self._done = new, tick, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                written += call(os.write, self._new.path, self._new.file.fd, view[written : written + _STEP])
                self._tick(self._done + written)
        except BaseException as error:
            self.error = error
            raise
        self._done += written
        return written

    def flush(self) -> None:
        pass


def write_torch(new: NewFile, entries: Sequence[Entry], tick: Callable[[int], object]) -> WriteResult:
    """Writes ``entries`` into ``new`` with torch.save, as a plain dict from names to tensors; tied tensors share a storage.

    `fits_torch` must be true of every entry.
    """
    state: dict[str, torch.Tensor] = {}
    for entry in entries:
        assert fits_torch(entry)
        state[entry.name] = state[entry.tied_to] if entry.tied_to is not None else _with_own_storage(entry.tensor)
    sink = _Sink(new, tick)
    try:
        torch.save(state, sink)  # type: ignore[arg-type]
    except BaseException as raised:
        # Ends a reference cycle that the garbage collector cannot see, because torch's C++ writer refers to the sink.
        error, sink.error = sink.error or _interrupt(raised), None
        if isinstance(error, CallFailed):
            raise new.failure(error) from error
        if error is not None:
            raise error from None
        raise
    new.commit()
    return WriteResult(False, _STEP, "torch")


def _interrupt(error: BaseException) -> BaseException | None:
    """The interrupt that led to ``error``, if one did: it may come before the sink can note it, and torch raises another error then."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        cause = cause.__context__
    return cause


def fits_torch(entry: Entry) -> bool:
    """Whether torch.save can write this tensor: uncast, contiguous memory, without conjugate and negative bits."""
    return isinstance(entry.source, TensorSource) and entry.source.memory() is not None


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """A view of ``tensor`` whose storage is only the tensor's own memory, since torch.save writes whole storages."""
    storage, begin = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    length = tensor.numel() * tensor.element_size()
    own = storage[begin : begin + length]
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(own, 0, tensor.shape, tensor.stride())
