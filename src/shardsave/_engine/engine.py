"""The engine: blocks of bytes between tensors and files, in one pass through a bounded ring of staging memory.

`write` and `read` choose between the C++ extension and `shardsave._engine.portable`; both move the same bytes and give the same sums.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from shardsave._common import shutdown
from shardsave._common.assembled import Assembled, Memory
from shardsave._common.backend import native, warn_if_portable
from shardsave._common.gc_pause import gc_paused
from shardsave._engine import gather
from shardsave._format.layout import Blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The most that one block covers, in bytes: the size of a slot of the ring.
BLOCK_BYTES = 8 << 20

Tick = Callable[[int], object]
Access = Literal["auto", "buffered", "direct"]


class Piece(NamedTuple):
    """The memory that a run of a file's bytes comes from or goes to.

    ``dtype`` is that of the bytes in the file, perhaps not the tensor's, ``nbytes`` how many they are there. Without a ``tensor``
    the bytes are only read and summed.
    """

    tensor: Memory | None
    dtype: torch.dtype
    nbytes: int


class Transfer(NamedTuple):
    """What a run did: ``sums`` has the CRC-64/NVME of each piece (none without ``checksum``), ``direct`` one answer a file."""

    sums: tuple[int, ...]
    direct: tuple[bool, ...]
    staging_bytes: int
    pinned: bool
    notes: tuple[str, ...] = ()


class TransferFault(Exception):
    """A call on a file or a device failed; ``file`` is its place in the list of files, or -1."""

    def __init__(self, file: int, call: str, errno: int, offset: int, length: int, detail: str = "") -> None:
        super().__init__(file, call, errno, offset, length, detail)
        self.file = file
        self.call = call
        self.errno = errno
        self.offset = offset
        self.length = length
        self.detail = detail

    def __str__(self) -> str:
        reason = self.detail or os.strerror(self.errno)
        if self.file < 0:
            return f"{self.call}: {reason}"
        return f"{self.call} of {self.length} bytes at offset {self.offset}: {reason}"


def reserve(pieces: Sequence[Piece]) -> None:
    """Gets the staging memory for a run with ``pieces``, so that want of it is known before anything is written.

    Raises TransferFault.
    """
    if native is None:
        try:
            np.empty(BLOCK_BYTES, np.uint8)
        except MemoryError as error:
            raise _no_memory("allocation of staging memory", BLOCK_BYTES) from error
        return
    on_cuda = _cuda_devices(pieces)
    pinned = on_cuda and torch.version.hip is None and native.cuda_available()
    try:
        native.reserve_staging(slot_bytes=BLOCK_BYTES, pin_for=min(on_cuda) if pinned else -1)
    except native.Fault as fault:
        raise TransferFault(*fault.args) from None


def _no_memory(call: str, wanted: int) -> TransferFault:
    return TransferFault(-1, call, errno.ENOMEM, 0, wanted)


def write(
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    *,
    direct: bool,
    checksum: bool = True,
    tick: Tick,
) -> Transfer:
    """Writes ``blocks`` of ``pieces`` to the descriptors ``files``; whole blocks, the last one of a file padded with zeros.

    ``direct`` asks for O_DIRECT where the file system has it. ``tick(bytes done)`` is called on this thread every 10 ms
    or so, without the extension after each block; what it raises ends the run and is raised on. Raises TransferFault.
    """
    return _run(True, files, blocks, pieces, "direct" if direct else "buffered", checksum, tick)


def read(
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    *,
    access: Access = "auto",
    checksum: bool = True,
    tick: Tick,
) -> Transfer:
    """Fills ``pieces`` from ``blocks`` of the descriptors ``files``; the mirror image of `write`.

    ``access="auto"`` goes through the page cache where a file is (almost) wholly in it, and past it elsewhere.
    """
    return _run(False, files, blocks, pieces, access, checksum, tick)


def _run(
    write: bool,
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    access: Access,
    checksum: bool,
    tick: Tick,
) -> Transfer:
    from_caller: list[MemoryError] = []  # a want of memory that is not the engine's

    def tick_or_end(done: int) -> None:
        shutdown.raise_if_ending()
        try:
            tick(done)
        except MemoryError as error:
            from_caller.append(error)
            raise

    if native is None:
        from shardsave._engine import portable

        warn_if_portable()
        try:
            return portable.run(write, files, blocks, pieces, checksum, access == "direct", tick_or_end)
        except MemoryError as error:
            if error in from_caller:
                raise
            raise _no_memory("allocation of working memory", 0) from error
    with gc_paused():
        places = np.fromiter(chain.from_iterable(map(_place, pieces)), np.int64, 2 * len(pieces)).reshape(-1, 2)
        piece_bytes = np.array([piece.nbytes for piece in pieces], dtype=np.int64)
    kinds = set(places[:, 0].tolist())
    devices = sorted(kind for kind in kinds if kind >= 0)
    elsewhere = [pieces[n] for n in np.flatnonzero(places[:, 0] != native.HOST).tolist()]
    callers_stream = {device: torch.cuda.current_stream(device) for device in _cuda_devices(elsewhere)}

    def lend(piece: int, offset: int, view: memoryview) -> None:
        tensor = pieces[piece].tensor
        assert tensor is not None
        # Workers have streams of their own (torch's current stream is thread-local): copies must follow the caller's work.
        device = tensor.get_device() if isinstance(tensor, torch.Tensor) and tensor.is_cuda else None
        ordered = torch.cuda.stream(callers_stream[device]) if device is not None else contextlib.nullcontext()
        with ordered:
            if write:
                gather.fill(tensor, pieces[piece].dtype, offset, view)
            else:
                assert isinstance(tensor, torch.Tensor)
                gather.drain(tensor, pieces[piece].dtype, offset, view)

    try:
        result = native.run(
            write=write,
            files=np.array(files, dtype=np.int64),
            access=access,
            blocks=blocks.table,
            segments=_segment_table(blocks.segments, places),
            piece_bytes=piece_bytes,
            checksum=checksum,
            streams=[(device, callers_stream[device].cuda_stream) for device in devices],
            workers=_workers(access, with_device=bool(devices)),
            slot_bytes=BLOCK_BYTES,
            lend=lend if native.LENT in kinds else None,
            tick=tick_or_end,
        )
    except native.Fault as fault:
        raise TransferFault(*fault.args) from None
    except MemoryError as error:
        if error in from_caller:
            raise
        raise _no_memory("allocation of working memory", 0) from error
    return Transfer(tuple(result.sums.tolist()), tuple(result.direct), result.staging_bytes, result.pinned, tuple(result.notes))


def _workers(access: Access, *, with_device: bool) -> int:
    """Two for each processor, eight at most, one copying while the other waits for the disk: each has a slot to touch first.

    Through the cache only processors help. A device has one for each slot of the ring: most wait for a copy.
    """
    if with_device:
        return 16
    processors = len(os.sched_getaffinity(0))
    return max(1, min(8, processors if access == "buffered" else 2 * processors))


def _place(piece: Piece) -> tuple[int, int]:
    """Which memory a piece lies in, as a value of the extension's first column, and its address there."""
    assert native is not None
    tensor, dtype, _ = piece
    if tensor is None:
        return native.DISCARD, 0
    if isinstance(tensor, Assembled):
        return native.LENT, 0
    if tensor.dtype == dtype and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.is_cpu:
            return native.HOST, tensor.data_ptr()
        if tensor.is_cuda and torch.version.hip is None and native.cuda_available():
            return tensor.get_device(), tensor.data_ptr()
    return native.LENT, 0


def _segment_table(segments: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of memory, address, length, offset in the block, piece, offset in the piece."""
    piece, piece_offset, length, at = segments.T
    memory, address = places[piece].T
    return np.stack([memory, np.where(address != 0, address + piece_offset, 0), length, at, piece, piece_offset], axis=1)


def _cuda_devices(pieces: Sequence[Piece]) -> set[int]:
    return {tensor.get_device() for tensor, _, _ in pieces if isinstance(tensor, torch.Tensor) and tensor.is_cuda}
