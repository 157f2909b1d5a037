"""Copies of tensors in host memory. The memory is kept and used again: fresh memory may cost ten times as much as the copy."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from shardsave._common.free_memory import free_memory, return_freed_memory
from shardsave._common.sources import ByteSource
from shardsave._common.words import human_bytes
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks
from shardsave._engine.engine import HostMemory
from shardsave._engine.transfer import BLOCK_BYTES, STILL, TransferFault
from shardsave._format.packing import ALIGNMENT
from shardsave.errors import OutOfMemoryError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A copy that is not beside its neighbour in a file begins at a multiple of this, in bytes: a line of the processor's cache.
_LINE = 64

#: Memory is allocated in multiples of this, in bytes: a huge page.
_ROUNDING = 2 << 20

#: Less memory is allocated without asking how much is free.
_SMALL = 64 << 20


class _Region(NamedTuple):
    """Memory with copies in it, and its address."""

    view: memoryview
    address: int


class SnapshotSource:
    """The copy of another source in snapshot memory, and the checksum (``crc``) of its bytes. Nothing reads into it."""

    __slots__ = ("_address", "_region", "crc", "dtype", "nbytes", "shape")

    cuda_device = -1

    def __init__(self, source: ByteSource, nbytes: int, crc: int, region: _Region, begin: int) -> None:
        self.dtype: torch.dtype = source.dtype
        self.shape: tuple[int, ...] = source.shape
        self.nbytes = nbytes
        self.crc = crc
        self._region = region  # keeps the memory alive
        self._address = region.address + begin

    def memory(self) -> tuple[int, int]:
        return STILL, self._address

    @property
    def tensor(self) -> torch.Tensor:
        """The copy, where it is."""
        begin = self._address - self._region.address
        content = torch.frombuffer(self._region.view, dtype=torch.uint8, count=self.nbytes, offset=begin)
        return content.view(self.dtype).view(self.shape)

    def gather(self, offset: int, view: memoryview) -> None:
        begin = self._address - self._region.address + offset
        view[:] = self._region.view[begin : begin + len(view)]

    def scatter(self, offset: int, view: memoryview) -> None:
        raise NotImplementedError("a snapshot is only written")


def copy_of(source: ByteSource) -> SnapshotSource:
    """``source``, which is a copy."""
    assert isinstance(source, SnapshotSource)
    return source


class Copies(NamedTuple):
    """Copies of ``pieces`` in snapshot memory: their lengths, their checksums, and where they begin in ``region``."""

    pieces: Sequence[ByteSource]
    nbytes: Sequence[int]
    sums: Sequence[int]
    begins: Sequence[int]
    region: _Region

    def sources(self) -> list[SnapshotSource]:
        """A source for each copy. The memory stays alive as long as one of them."""
        rows = zip(self.pieces, self.nbytes, self.sums, self.begins)
        return [SnapshotSource(piece, length, crc, self.region, begin) for piece, length, crc, begin in rows]


class NoRoom(Exception):
    """Snapshot memory does not fit; the message has the numbers."""


def places(nbytes: Sequence[int], files: Sequence[int] | None = None) -> tuple[NDArray[np.int64], int]:
    """Where copies of so many bytes each begin in snapshot memory, and how much of it they need together.

    ``files``: the number of the file of each, ascending, then -1 for what goes elsewhere. Copies for one file lie as there, from a page
    on, so that they can be written without another copy, if nothing of the file is left out.
    """
    lengths = np.array(nbytes, np.int64)
    of_file = np.full(len(lengths), -1) if files is None else np.array(files, np.int64)
    if not len(lengths):
        return lengths, 0
    first = np.flatnonzero(np.concatenate([[True], (of_file[1:] != of_file[:-1]) | (of_file[1:] < 0)]))  # of each group
    together = np.concatenate([[0], np.cumsum(lengths)])
    group_bytes = np.diff(together[first], append=together[-1])
    unit = np.where(of_file[first] < 0, _LINE, ALIGNMENT)
    ends = np.cumsum(-(-group_bytes // unit) * unit)
    shift = ends - -(-group_bytes // unit) * unit - together[first]
    return together[:-1] + np.repeat(shift, np.diff(first, append=len(lengths))), int(ends[-1])


def take(
    pieces: Sequence[ByteSource], nbytes: Sequence[int], begins: NDArray[np.int64], memory: HostMemory, workers: int
) -> Copies:
    """Copies ``pieces``, whose lengths are ``nbytes``, to ``begins`` in ``memory``. Raises OutOfMemoryError."""
    try:
        transfer = engine.gather(block_table(begins, nbytes), pieces, into=memory.view, workers=workers, tick=_ignore)
    except TransferFault as fault:
        raise refusal(NoRoom(f"{human_bytes(sum(nbytes))} were expected to be copied, {fault}")) from fault
    _clear_ends(memory, begins, np.array(nbytes, np.int64))
    region = _Region(memory.view, int(np.frombuffer(memory.view, np.uint8).ctypes.data) if memory.nbytes else 0)
    return Copies(pieces, nbytes, transfer.sums, begins.tolist(), region)


def _clear_ends(memory: HostMemory, begins: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
    """Clears what is left of the last page of each file: it is written too, and may be of an earlier snapshot."""
    ends = begins + nbytes
    page_ends = -(-ends // ALIGNMENT) * ALIGNMENT
    last = np.flatnonzero(page_ends <= np.append(begins[1:], memory.nbytes))
    for end, page_end in zip(ends[last].tolist(), page_ends[last].tolist()):
        memory.view[end:page_end] = bytes(page_end - end)


def block_table(begins: NDArray[np.int64], nbytes: Sequence[int]) -> Blocks:
    """The engine's blocks for copies of ``nbytes`` at ``begins``."""
    extents = np.ones((len(begins), 4), np.int64)
    extents[:, 0] = 0
    extents[:, 1] = begins
    extents[:, 2] = nbytes
    return blocks(extents, BLOCK_BYTES)


_lock = threading.Lock()
_kept: list[HostMemory] = []  # none or one: what is not in use now; guarded by the lock


def borrow(nbytes: int, device: int) -> HostMemory:
    """At least ``nbytes`` of memory, pinned if it is for the CUDA device ``device`` (-1: for none). Must be given to `give_back`.

    Raises NoRoom, before anything is allocated, if it would not fit without swapping.
    """
    with _lock:
        memory = _kept.pop() if _kept else None
    if memory is not None:
        if memory.nbytes >= nbytes and (device < 0 or memory.pinned or memory.note):
            return memory
        memory.close()
        del memory
    size = -(-nbytes // _ROUNDING) * _ROUNDING
    _check_fits(size)
    try:
        return HostMemory(size, device=device)
    except TransferFault as fault:
        raise NoRoom(f"{human_bytes(size)} were expected, {fault}") from fault


def give_back(memory: HostMemory) -> None:
    """Keeps ``memory`` for the next snapshot. Nothing may read it any more."""
    with _lock:
        if _kept and _kept[0].nbytes >= memory.nbytes:
            memory.close()
        else:
            for smaller in _kept:
                smaller.close()
            _kept[:] = [memory]


def release_snapshot_memory() -> None:
    """Frees the memory that is kept for the next snapshot; what a save in flight uses stays."""
    with _lock:
        for memory in _kept:
            memory.close()
        _kept.clear()


def refusal(error: NoRoom) -> OutOfMemoryError:
    """The error for a snapshot that was requested and does not fit."""
    return OutOfMemoryError(
        f"cannot copy what is saved: {error}; staging='ring' copies less, save() copies nothing; nothing was written"
    )


def _check_fits(size: int) -> None:
    if size < _SMALL:
        return
    free = free_memory()
    if free is not None and size > free.bytes:
        return_freed_memory()  # it takes time, and is seldom needed
        free = free_memory()
    if free is not None and size > free.bytes:
        raise NoRoom(f"{human_bytes(size)} of memory were expected, {free.of} has {human_bytes(free.bytes)} free")


def _ignore(_: int) -> None:
    pass


def _forget_in_child() -> None:
    """A forked child does not have the memory."""
    global _lock
    _lock = threading.Lock()
    _kept.clear()


os.register_at_fork(after_in_child=_forget_in_child)
