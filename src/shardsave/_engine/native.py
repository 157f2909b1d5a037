"""The C++ engine: turns pieces into the tables that the extension reads, and lends memory that it cannot reach itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import shardsave._native as extension
from shardsave._common.gc_pause import gc_paused
from shardsave._engine.transfer import BLOCK_BYTES, STILL, Piece, Request, Tick, Transfer, TransferFault, Windows
from shardsave._engine.workers import copiers_and_workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Lend = Callable[[int, int, memoryview], None]


def reserve(pieces: Sequence[Piece]) -> None:
    """As `shardsave._engine.engine.reserve`; the memory is pinned if there are pieces on a CUDA device."""
    devices = _cuda_devices(pieces)
    pinned = devices and _reaches_cuda()
    try:
        extension.reserve_staging(slot_bytes=BLOCK_BYTES, pin_for=min(devices) if pinned else -1)
    except extension.Fault as fault:
        raise TransferFault(*fault.args) from None


def staging_bytes(pieces: Sequence[Piece]) -> int:
    """As `shardsave._engine.engine.staging_bytes`."""
    return BLOCK_BYTES * (extension.DEVICE_SLOTS if _cuda_devices(pieces) and _reaches_cuda() else extension.SLOTS)


def host_memory(nbytes: int, device: int) -> extension.HostMemory:
    """``nbytes`` of memory, pinned if ``device`` is the ordinal of a CUDA device and the driver agrees. Raises TransferFault."""
    try:
        return extension.HostMemory(nbytes=nbytes, pin_for=device if torch.version.hip is None else -1)
    except extension.Fault as fault:
        raise TransferFault(*fault.args) from None


def run(request: Request, tick: Tick) -> Transfer:
    """Runs the C++ engine. It ignores ``start_writeback``: it starts writeback if direct access was requested and refused."""
    places = _places(request.pieces)
    known = _still_sums(request, places)
    kinds = set(places[:, 0].tolist())
    devices = sorted(kind for kind in kinds if kind >= 0)
    elsewhere = (places[:, 0] != extension.HOST) & (places[:, 0] != STILL)
    not_on_host = [request.pieces[n] for n in np.flatnonzero(elsewhere).tolist()]
    callers_stream = {device: torch.cuda.current_stream(device) for device in _cuda_devices(not_on_host)}
    windows = request.windows
    copiers, workers = copiers_and_workers(request, with_device=bool(devices))
    try:
        result = extension.run(
            write=request.write,
            files=None if request.files is None else np.array(request.files, dtype=np.int64),
            access=request.access,
            blocks=request.blocks.table,
            segments=_segment_table(request.blocks.segments, places),
            piece_bytes=request.blocks.piece_bytes,
            checksum=request.checksum,
            streams=[(device, callers_stream[device].cuda_stream) for device in devices],
            workers=workers,
            slot_bytes=BLOCK_BYTES,
            copiers=copiers,
            lend=_lender(request, callers_stream) if extension.LENT in kinds else None,
            tick=tick,
            into=request.into,
            taken=request.taken,
            **({} if windows is None else _window_hooks(windows)),
        )
    except extension.Fault as fault:
        raise TransferFault(*fault.args) from None
    sums = result.sums.tolist()
    for number, crc in known.items():
        sums[number] = crc
    return Transfer(tuple(sums), tuple(result.direct), result.staging_bytes, result.pinned, tuple(result.notes))


def _window_hooks(windows: Windows) -> dict[str, Any]:
    return {"windowed": windows.of_block.tolist(), "take_window": windows.take, "give_window": windows.give_back}


def _lender(request: Request, callers_stream: dict[int, torch.cuda.Stream]) -> Lend:
    """The function that workers call for pieces whose bytes they cannot reach themselves."""

    def lend(number: int, offset: int, view: memoryview) -> None:
        source = request.pieces[number]
        assert source is not None
        # Workers have streams of their own (torch's current stream is thread-local): copies must follow the caller's work.
        stream = callers_stream.get(source.cuda_device)
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            if request.write:
                source.gather(offset, view)
            else:
                source.scatter(offset, view)

    return lend


@gc_paused()
def _places(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """For each piece: its memory (a CUDA ordinal, or HOST, LENT or DISCARD of the extension) and its address there."""
    discarded, lent = (extension.DISCARD, 0), (extension.LENT, 0)
    # `ByteSource.memory` counts devices as the extension does: HOST is -1.
    rows = (discarded if source is None else source.memory() or lent for source in pieces)
    places = np.fromiter(chain.from_iterable(rows), np.int64, 2 * len(pieces)).reshape(-1, 2)
    on_device = places[:, 0] >= 0
    if on_device.any() and not _reaches_cuda():
        places[on_device] = lent
    return places


def _still_sums(request: Request, places: NDArray[np.int64]) -> dict[int, int]:
    """The checksums of pieces in still memory, by number. If one is not known, or no file is written, ``places`` then say HOST."""
    known: dict[int, int] = {}
    for number in np.flatnonzero(places[:, 0] == STILL).tolist():
        crc = getattr(request.pieces[number], "crc", None)  # a part of such a piece has none
        if crc is None or not request.write or request.files is None:
            places[number, 0] = extension.HOST
        else:
            known[number] = crc
    return known if request.checksum else {}


def _segment_table(segments: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of memory, address, length, offset in the block, piece, offset in the piece."""
    piece, piece_offset, length, at = segments.T
    memory, address = places[piece].T
    return np.stack([memory, np.where(address != 0, address + piece_offset, 0), length, at, piece, piece_offset], axis=1)


def _cuda_devices(pieces: Sequence[Piece]) -> set[int]:
    return {source.cuda_device for source in pieces if source is not None} - {-1}


def _reaches_cuda() -> bool:
    """Whether the extension can copy from and to CUDA devices; torch also calls AMD's devices CUDA."""
    return torch.version.hip is None and extension.cuda_available()
