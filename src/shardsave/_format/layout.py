"""Which tensor goes into which shard, and which bytes the engine moves together: layout arithmetic, no I/O.

Everything here is a pure function of the stored tensors, so every process that sees the same tensors plans the same files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._format.dtypes import item_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Data begins, and blocks begin and end, at a multiple of this many bytes: what O_DIRECT asks for at most (open(2), statx(2)).
ALIGNMENT = 4096


class StoredTensor(NamedTuple):
    """What a file has: ``shape`` as the header says it, ``nbytes`` in the file; ``frozen`` decides whom it is packed with."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    frozen: bool = False


class Shard(NamedTuple):
    """The tensors of one file in file order; ``begins`` are byte offsets from the start of the data."""

    tensors: tuple[StoredTensor, ...]
    begins: tuple[int, ...]
    data_bytes: int


class Blocks(NamedTuple):
    """The engine's units, aligned ranges of files, and the segments that fill them, or are filled from them: rows of int64, bytes.

    ``table``: file, offset, length, first segment. Offset and length are multiples of `ALIGNMENT`, so the last block of a file may
    reach past its end. ``segments``: piece, offset in the piece, length, offset in the block.
    """

    table: NDArray[np.int64]
    segments: NDArray[np.int64]


def pack(tensors: Sequence[StoredTensor], max_shard_size: int) -> tuple[Shard, ...]:
    """Distributes ``tensors`` over shards of at most ``max_shard_size`` bytes of data, frozen and trainable apart.

    Greedy in the order given; a tensor larger than the bound gets a shard of its own. Between two repeated blocks
    (``layers.3.`` and ``layers.4.``) a shard ends early when it is at least three quarters full, so that a block is not
    torn when a little room is all that it costs. No tensors at all are one empty shard.
    """
    groups: list[list[StoredTensor]] = []
    for frozen in (True, False):
        chosen = [tensor for tensor in tensors if tensor.frozen == frozen]
        if chosen:
            groups.extend(_greedy(chosen, max_shard_size))
    return tuple(_lay_out(group) for group in groups) or (_lay_out([]),)


def _greedy(tensors: Iterable[StoredTensor], bound: int) -> list[list[StoredTensor]]:
    groups: list[list[StoredTensor]] = []
    current: list[StoredTensor] = []
    room = bound
    for tensor in tensors:
        nearly_full = bool(current) and room <= bound // 4
        at_boundary = nearly_full and _repeated_block(tensor.name) != _repeated_block(current[-1].name)
        if current and (tensor.nbytes > room or at_boundary):
            groups.append(current)
            current, room = [], bound
        current.append(tensor)
        room -= tensor.nbytes
    if current:
        groups.append(current)
    return groups


def _repeated_block(name: str) -> str | None:
    """``layers.3.mlp.weight`` → ``layers.3``: the name up to its first number, or None where there is none."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: depth + 1])
    return None


def _lay_out(tensors: Sequence[StoredTensor]) -> Shard:
    align = {dtype: -item_bytes(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    ordered = sorted(tensors, key=lambda tensor: align[tensor.dtype])  # stable: state order within an alignment
    *begins, end = accumulate((tensor.nbytes for tensor in ordered), initial=0)
    return Shard(tuple(ordered), tuple(begins), end)


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
