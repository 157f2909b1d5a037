"""The engine's blocks: aligned ranges of files, and the segments of memory that fill them or are filled from them. No I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._format.layout import ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Blocks(NamedTuple):
    """The engine's units, aligned ranges of files, and the segments that fill them, or are filled from them: rows of int64, bytes.

    ``table``: file, offset, length, first segment. Offset and length are multiples of `ALIGNMENT`, so the last block of a file may
    reach past its end. ``segments``: piece, offset in the piece, length, offset in the block.
    """

    table: NDArray[np.int64]
    segments: NDArray[np.int64]


def blocks(extents: NDArray[np.int64], block_bytes: int) -> Blocks:
    """Cuts ``extents`` into blocks of at most ``block_bytes``, a multiple of `ALIGNMENT`.

    The n-th row of ``extents`` is where piece n lies: file, offset, length, and the grain at which alone it is cut, in bytes.
    They are sorted by file and offset. Neighbours share blocks; a gap of a page or more starts a new one. Where extents begin at
    an aligned offset and follow each other without a gap, as in a file being written, blocks do not overlap; otherwise two may
    read the same page.
    """
    piece = np.flatnonzero(extents[:, 2])
    file, offset, length, grain = extents[piece].T
    end = offset + length
    apart = (file[1:] != file[:-1]) | (offset[1:] - end[:-1] >= ALIGNMENT)
    apart |= offset[1:] < end[:-1]  # bytes that are wanted twice
    runs = [0, *(np.flatnonzero(apart) + 1).tolist(), len(piece)]
    at, position = _block_begins(runs, offset.tolist(), end.tolist(), grain.tolist(), block_bytes)

    # What an extent has left where a block begins inside of it is a segment of its own, right behind that of its first part.
    inside = position > offset[at]
    cut, behind = at[inside], at[inside] + 1
    extent = np.insert(np.arange(len(piece)), behind, cut)
    begin = np.insert(offset, behind, position[inside])
    stop = end[extent]
    goes_on = np.flatnonzero(extent[1:] == extent[:-1])
    stop[goes_on] = begin[goes_on + 1]

    start = position - position % ALIGNMENT
    first = at + np.cumsum(inside)
    counts = np.diff(first, append=len(extent))
    within = begin - np.repeat(start, counts)
    used = stop[first + counts - 1] - start
    table = np.stack([file[at], start, -(-used // ALIGNMENT) * ALIGNMENT, first], axis=1)
    return Blocks(table, np.stack([piece[extent], begin - offset[extent], stop - begin, within], axis=1))


def _block_begins(
    runs: Sequence[int], offset: Sequence[int], end: Sequence[int], grain: Sequence[int], block_bytes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each block the extent that it begins with, and where in the file; ``runs``: where extents are neighbours no more."""
    found: list[tuple[int, int]] = []
    for at, last in pairwise(runs):
        position = offset[at] if at < last else 0
        while at < last:
            found.append((at, position))
            limit = position - position % ALIGNMENT + block_bytes
            at = bisect_right(end, limit, at, last)
            if at < last:  # it does not fit as a whole; where some of it does, it is cut at a multiple of its grain
                position = max(position, offset[at], limit - (limit - offset[at]) % grain[at])
    begins = np.array(found, dtype=np.int64).reshape(-1, 2)
    return begins[:, 0], begins[:, 1]
