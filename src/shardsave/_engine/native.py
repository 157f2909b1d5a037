"""The C++ engine: turns pieces into the tables that the extension reads, and lends memory that it cannot reach itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

import shardsave._native as extension
from shardsave._common.assembled import Assembled
from shardsave._common.gc_pause import collector_still
from shardsave._engine import gather
from shardsave._engine.transfer import BLOCK_BYTES, Piece, Request, Tick, Transfer, TransferFault
from shardsave._engine.workers import worker_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Lend = Callable[[int, int, memoryview], None]


def reserve(pieces: Sequence[Piece]) -> None:
    """As `shardsave._engine.engine.reserve`; pinned if there are pieces on a CUDA device."""
    devices = _cuda_devices(pieces)
    pinned = devices and _reaches_cuda()
    try:
        extension.reserve_staging(slot_bytes=BLOCK_BYTES, pin_for=min(devices) if pinned else -1)
    except extension.Fault as fault:
        raise TransferFault(*fault.args) from None


def run(request: Request, tick: Tick) -> Transfer:
    """Runs the C++ engine, which starts writeback exactly where direct access was asked for and the file system refused it."""
    if request.start_writeback and request.access != "direct":
        raise ValueError("start_writeback needs access='direct'")
    pieces = request.pieces
    with collector_still():
        places = np.fromiter(chain.from_iterable(map(_place, pieces)), np.int64, 2 * len(pieces)).reshape(-1, 2)
        piece_bytes = np.array([piece.nbytes for piece in pieces], dtype=np.int64)
    kinds = set(places[:, 0].tolist())
    devices = sorted(kind for kind in kinds if kind >= 0)
    elsewhere = [pieces[n] for n in np.flatnonzero(places[:, 0] != extension.HOST).tolist()]
    callers_stream = {device: torch.cuda.current_stream(device) for device in _cuda_devices(elsewhere)}
    try:
        result = extension.run(
            write=request.write,
            files=np.array(request.files, dtype=np.int64),
            access=request.access,
            blocks=request.blocks.table,
            segments=_segment_table(request.blocks.segments, places),
            piece_bytes=piece_bytes,
            checksum=request.checksum,
            streams=[(device, callers_stream[device].cuda_stream) for device in devices],
            workers=worker_count(request.access, with_device=bool(devices)),
            slot_bytes=BLOCK_BYTES,
            lend=_lender(request, callers_stream) if extension.LENT in kinds else None,
            tick=tick,
        )
    except extension.Fault as fault:
        raise TransferFault(*fault.args) from None
    return Transfer(tuple(result.sums.tolist()), tuple(result.direct), result.staging_bytes, result.pinned, tuple(result.notes))


def _lender(request: Request, callers_stream: dict[int, torch.cuda.Stream]) -> Lend:
    """What workers call for memory that only torch can reach."""

    def lend(number: int, offset: int, view: memoryview) -> None:
        piece = request.pieces[number]
        tensor = piece.tensor
        assert tensor is not None
        # Workers have streams of their own (torch's current stream is thread-local): copies must follow the caller's work.
        device = tensor.get_device() if isinstance(tensor, torch.Tensor) and tensor.is_cuda else None
        with torch.cuda.stream(callers_stream[device]) if device is not None else contextlib.nullcontext():
            if request.write:
                gather.fill(tensor, piece.dtype, offset, view)
            else:
                assert isinstance(tensor, torch.Tensor)
                gather.drain(tensor, piece.dtype, offset, view)

    return lend


def _place(piece: Piece) -> tuple[int, int]:
    """Which memory a piece lies in, as a value of the extension's first column, and its address there."""
    tensor, dtype, _ = piece
    if tensor is None:
        return extension.DISCARD, 0
    if isinstance(tensor, Assembled):
        return extension.LENT, 0
    if tensor.dtype == dtype and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.is_cpu:
            return extension.HOST, tensor.data_ptr()
        if tensor.is_cuda and _reaches_cuda():
            return tensor.get_device(), tensor.data_ptr()
    return extension.LENT, 0


def _segment_table(segments: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of memory, address, length, offset in the block, piece, offset in the piece."""
    piece, piece_offset, length, at = segments.T
    memory, address = places[piece].T
    return np.stack([memory, np.where(address != 0, address + piece_offset, 0), length, at, piece, piece_offset], axis=1)


def _cuda_devices(pieces: Sequence[Piece]) -> set[int]:
    return {tensor.get_device() for tensor, _, _ in pieces if isinstance(tensor, torch.Tensor) and tensor.is_cuda}


def _reaches_cuda() -> bool:
    """Whether the extension can copy from and to CUDA devices; torch also calls AMD's devices CUDA."""
    return torch.version.hip is None and extension.cuda_available()
