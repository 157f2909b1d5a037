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

    The n-th row of ``extents`` says where piece n is: file, offset, length, and grain; the piece is only cut at multiples of the
    grain. Rows are sorted by file and offset. Neighbours share blocks; a gap of a page or more starts a new block. Blocks do not
    overlap if the extents begin at an aligned offset and have no gaps, as in a file that is written; otherwise two blocks may read
    the same page.
    """
    piece = np.flatnonzero(extents[:, 2])
    file, offset, length, grain = extents[piece].T
    end = offset + length
    is_boundary = (file[1:] != file[:-1]) | (offset[1:] - end[:-1] >= ALIGNMENT)
    is_boundary |= offset[1:] < end[:-1]  # two pieces have the same bytes
    boundaries = [0, *(np.flatnonzero(is_boundary) + 1).tolist(), len(piece)]
    first_extent, position = _block_begins(boundaries, offset.tolist(), end.tolist(), grain.tolist(), block_bytes)

    # If a block begins inside an extent, the rest of the extent is another segment, right after the segment of its first part.
    is_cut = position > offset[first_extent]
    cut_extent = first_extent[is_cut]
    extent = np.insert(np.arange(len(piece)), cut_extent + 1, cut_extent)
    begin = np.insert(offset, cut_extent + 1, position[is_cut])
    stop = end[extent]
    cut_segment = np.flatnonzero(extent[1:] == extent[:-1])
    stop[cut_segment] = begin[cut_segment + 1]

    block_offset = position - position % ALIGNMENT
    first_segment = first_extent + np.cumsum(is_cut)
    counts = np.diff(first_segment, append=len(extent))
    offset_in_block = begin - np.repeat(block_offset, counts)
    used_bytes = stop[first_segment + counts - 1] - block_offset
    table = np.stack([file[first_extent], block_offset, -(-used_bytes // ALIGNMENT) * ALIGNMENT, first_segment], axis=1)
    segments = np.stack([piece[extent], begin - offset[extent], stop - begin, offset_in_block], axis=1)
    return Blocks(table, segments, extents[:, 2].copy())


def interleaved(left: Blocks, right: Blocks) -> tuple[Blocks, NDArray[np.int64]]:
    """The blocks of both, evenly mixed, each in their order; pieces of ``right`` come after those of ``left``.

    Also returns for each block its number in ``left``, -1 if it is one of ``right``.
    """
    counts = [len(one.table) for one in (left, right)]
    place = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in counts])
    order = np.argsort(place, kind="stable")
    table = np.concatenate([left.table, right.table])[order]
    segments = np.concatenate([left.segments, right.segments])
    segments[len(left.segments) :, 0] += len(left.piece_bytes)
    lengths = np.concatenate([np.diff(one.table[:, 3], append=len(one.segments)) for one in (left, right)])[order]
    first = np.concatenate([left.table[:, 3], right.table[:, 3] + len(left.segments)])[order]
    table[:, 3] = np.cumsum(lengths) - lengths
    moved = np.repeat(first - table[:, 3], lengths) + np.arange(len(segments))
    merged = Blocks(table, segments[moved], np.concatenate([left.piece_bytes, right.piece_bytes]))
    return merged, np.where(order < counts[0], order, -1)


def _block_begins(
    boundaries: Sequence[int], offset: Sequence[int], end: Sequence[int], grain: Sequence[int], block_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each block: the number of its first extent, and the position in the file of its first byte that belongs to an extent.

    ``boundaries``: the numbers of the extents that cannot share a block with the extent before them, and last the number of all extents.
    """
    begins: list[tuple[int, int]] = []
    for extent, stop in pairwise(boundaries):
        position = offset[extent] if extent < stop else 0
        while extent < stop:
            begins.append((extent, position))
            limit = position - position % ALIGNMENT + block_bytes
            extent = bisect_right(end, limit, extent, stop)
            if extent < stop:  # this extent does not fit; if a part of it does, it is cut at a multiple of its grain
                position = max(position, offset[extent], limit - (limit - offset[extent]) % grain[extent])
    extents, positions = np.array(begins, dtype=np.int64).reshape(-1, 2).T
    return extents, positions
