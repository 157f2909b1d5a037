"""Cuts files into blocks, the aligned ranges that the engine reads and writes, and pieces into the segments of these. No I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._format.packing import ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Blocks(NamedTuple):
    """What the engine moves, as tables of int64; all lengths and offsets are in bytes.

    ``table``, a row for each block: file, offset, length, first segment. Offset and length are multiples of `ALIGNMENT`, so the last
    block of a file may reach past its end. ``segments``, in the order of the blocks that they belong to: piece, offset in the piece,
    length, offset in the block. ``piece_bytes``: the length of each piece.
    """

    table: NDArray[np.int64]
    segments: NDArray[np.int64]
    piece_bytes: NDArray[np.int64]


def blocks(extents: NDArray[np.int64], block_bytes: int) -> Blocks:
    """Cuts ``extents`` into blocks of at most ``block_bytes``, a multiple of `ALIGNMENT`.

    The n-th row of ``extents`` says where piece n lies: file, offset, length, and grain; the piece is only cut at multiples of the
    grain. Rows are sorted by file and offset. Neighbours share blocks; a gap of a page or more starts a new block. Blocks do not
    overlap if the extents begin at an aligned offset and have no gaps, as in a file that is written; otherwise two blocks may read
    the same page.
    """
    piece = np.flatnonzero(extents[:, 2])
    file, offset, length, grain = extents[piece].T
    end = offset + length
    apart = (file[1:] != file[:-1]) | (offset[1:] - end[:-1] >= ALIGNMENT)
    apart |= offset[1:] < end[:-1]  # two pieces have the same bytes
    runs = [0, *(np.flatnonzero(apart) + 1).tolist(), len(piece)]
    at, position = _block_begins(runs, offset.tolist(), end.tolist(), grain.tolist(), block_bytes)

    # If a block begins inside an extent, the rest of the extent is another segment, right after the segment of its first part.
    inside = position > offset[at]
    cut, behind = at[inside], at[inside] + 1
    extent = np.insert(np.arange(len(piece)), behind, cut)
    begin = np.insert(offset, behind, position[inside])
    stop = end[extent]
    continued = np.flatnonzero(extent[1:] == extent[:-1])
    stop[continued] = begin[continued + 1]

    start = position - position % ALIGNMENT
    first = at + np.cumsum(inside)
    counts = np.diff(first, append=len(extent))
    within = begin - np.repeat(start, counts)
    used = stop[first + counts - 1] - start
    table = np.stack([file[at], start, -(-used // ALIGNMENT) * ALIGNMENT, first], axis=1)
    segments = np.stack([piece[extent], begin - offset[extent], stop - begin, within], axis=1)
    return Blocks(table, segments, extents[:, 2].copy())


def _block_begins(
    runs: Sequence[int], offset: Sequence[int], end: Sequence[int], grain: Sequence[int], block_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each block the number of its first extent, and its position in the file; ``runs``: the extents at which neighbours end."""
    begins: list[tuple[int, int]] = []
    for at, last in pairwise(runs):
        position = offset[at] if at < last else 0
        while at < last:
            begins.append((at, position))
            limit = position - position % ALIGNMENT + block_bytes
            at = bisect_right(end, limit, at, last)
            if at < last:  # this extent does not fit; if a part of it does, it is cut at a multiple of its grain
                position = max(position, offset[at], limit - (limit - offset[at]) % grain[at])
    extents, positions = np.array(begins, dtype=np.int64).reshape(-1, 2).T
    return extents, positions
