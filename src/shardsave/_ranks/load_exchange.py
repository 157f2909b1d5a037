"""Loads: brings what one rank reads to all ranks that need it, block by block, while the readers' engines read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from shardsave._common.gc_pause import gc_paused
from shardsave._common.layouts import Extent, Layout
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._engine import box_copies
from shardsave._engine.blocks import Blocks, blocks, interleaved
from shardsave._engine.transfer import BLOCK_BYTES, InWindow, Piece
from shardsave._ranks.copies import byte_strides, holding
from shardsave._ranks.exchange import Exchange, RunWindows
from shardsave._ranks.shares import Run, meeting, near
from shardsave._ranks.traffic import Traffic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.session import Session

#: Which ranks take which boxes of a tensor.
Takers = Mapping[int, Sequence[Extent]]


class _Taken(Enum):
    """What becomes of a piece: nothing, it goes to one place on the rank that reads it, or anything else."""

    BY_NOBODY = 0
    IN_ONE_PIECE = 1
    IN_SHARES = 2


class Reading(NamedTuple):
    """What one rank reads. The n-th row of ``extents`` is the extent of piece n, as `_engine.blocks.blocks` wants it (file, offset,
    length, grain), sorted by file and offset. ``tensor`` and ``start``: the tensor of each piece, and at which byte of it it begins.
    """

    extents: NDArray[np.int64]
    tensor: Sequence[int]
    start: Sequence[int]


class LoadExchange:
    """What ranks exchange in one load. All ranks make it with equal ``readings``, one for each rank.

    ``targets``: the tensors by number, each with the boxes that this rank fills (`Spread.local`). Each rank takes all boxes that it holds.

    Use: make it (no I/O), start its ``exchange``, then ``engine.read(files, *delivering.run(…), …)`` (also where there is nothing to
    read), finish the exchange; close that in any case. From start to finish, local tensors are written on threads of the exchange. The
    sums of the run are those of this rank's pieces. A piece that this rank alone needs, and whose place is contiguous, is read straight
    into it.
    """

    def __init__(self, session: Session, readings: Sequence[Reading], targets: Sequence[Spread]) -> None:
        self._session = session
        self._readings = readings
        self._targets = targets
        self._takers = _AllBoxes().of
        self._runs: dict[int, Run] = {}
        traffic = Traffic(session.rank, "out", self._run, self._takers)
        with gc_paused():
            self._windowed = traffic.windowed()
        self.exchange = Exchange(session, range(session.size), np.flatnonzero(self._windowed).tolist(), traffic)

    def run(self, own: Blocks, own_pieces: Sequence[Piece]) -> tuple[Blocks, list[Piece], RunWindows]:
        """What this rank's engine reads: what is exchanged, and ``own`` between it, so that no disk waits for other ranks."""
        together, numbers = interleaved(self._run(self._session.rank).blocks, own)
        return together, [*self.pieces, *own_pieces], RunWindows(self.exchange, numbers, self._windowed)

    @cached_property
    def pieces(self) -> list[Piece]:
        """For each piece that this rank reads, where its bytes go; None: nowhere, nobody needs them."""
        run = self._run(self._session.rank)
        reading = self._readings[self._session.rank]
        found: list[Piece] = []
        for target, shared, start, nbytes in zip(reading.tensor, run.tensors, run.starts, run.blocks.piece_bytes.tolist()):
            tensor = self._targets[target]
            if shared is None:
                found.append(self._place(tensor, start, nbytes))
            else:
                found.append(InWindow(tensor.dtype, (nbytes // tensor.dtype.itemsize,), nbytes))
        return found

    def _run(self, reader: int) -> Run:
        """What ``reader`` reads. A piece that no other rank takes, and whose place on ``reader`` is contiguous, is not exchanged."""
        run = self._runs.get(reader)
        if run is None:
            extents, tensor, start = self._readings[reader]
            plan = blocks(np.asarray(extents, dtype=np.int64).reshape(-1, 4), BLOCK_BYTES)
            known: dict[tuple[int, int, int], _Taken] = {}  # by the identity of the layout, which many tensors share
            tensors: list[Spread | None] = []
            for target, at, nbytes in zip(tensor, start, plan.piece_bytes.tolist()):
                spread = self._targets[target]
                item = spread.dtype.itemsize
                key = id(spread.layout), at // item, (at + nbytes) // item
                taken = known.get(key)
                if taken is None:
                    taken = known[key] = self._taken(spread, reader, *key[1:])
                if taken is _Taken.IN_ONE_PIECE and reader == self._session.rank and self._place(spread, at, nbytes) is None:
                    taken = _Taken.IN_SHARES
                tensors.append(spread if taken is _Taken.IN_SHARES else None)
            run = self._runs[reader] = Run(plan, tensors, start)
        return run

    def _taken(self, tensor: Spread, reader: int, first: int, stop: int) -> _Taken:
        """Who takes elements ``first`` to ``stop`` of what ``reader`` reads."""
        takers, shape = self._takers(tensor, reader), tensor.layout.shape
        met = [
            rank
            for rank in (near(takers, shape, first, stop) if first < stop else ())
            for box in takers[rank]
            for _ in meeting(shape, first, stop, *box)
        ]
        return _Taken.BY_NOBODY if not met else _Taken.IN_ONE_PIECE if met == [reader] else _Taken.IN_SHARES

    def _place(self, tensor: Spread, start: int, nbytes: int) -> TensorSource | None:
        """The memory of this rank that is exactly these bytes of ``tensor``; None if there is none."""
        item, shape, rank = tensor.dtype.itemsize, tensor.layout.shape, self._session.rank
        first, stop = start // item, (start + nbytes) // item
        boxes = self._takers(tensor, rank).get(rank, ())
        shares = [share for box in boxes for share in meeting(shape, first, stop, *box)]
        if len(shares) != 1:
            return None
        begin, sizes, _ = shares[0]
        chunk = tensor.local[holding(tensor, begin, sizes)]
        if chunk.tensor.dtype != tensor.dtype or not chunk.tensor.is_contiguous():
            return None
        strides = byte_strides(tuple(chunk.tensor.shape), item)
        (row,) = box_copies.rows(sizes, strides, byte_strides(sizes, item), item)[:1]
        if row[2] != nbytes:
            return None
        begins = sum((a - b) * stride for a, b, stride in zip(begin, chunk.begin, strides)) // item
        with torch.no_grad():
            return TensorSource(chunk.tensor.detach().view(-1)[begins : begins + stop - first], tensor.dtype)


class _AllBoxes:
    """Every rank takes all boxes that it holds."""

    def __init__(self) -> None:
        self._of: dict[Layout, Takers] = {}

    def of(self, tensor: Spread, reader: int) -> Takers:
        layout = tensor.layout
        takers = self._of.get(layout)
        if takers is None:
            takers = self._of[layout] = {rank: boxes for rank in layout.ranks if (boxes := layout.boxes(rank))}
        return takers
