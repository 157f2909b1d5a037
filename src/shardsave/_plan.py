"""Which tensor goes into which shard, and which bytes the engine moves together: layout arithmetic, no I/O.

Everything here is a pure function of the stored tensors, so every process that sees the same tensors plans the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shardsave._dtypes import item_bytes

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


class Extent(NamedTuple):
    """A run of bytes in a file that belongs to one piece: ``piece_offset`` bytes into it, cut only at ``item_bytes``."""

    file: int
    offset: int
    length: int
    piece: int
    item_bytes: int
    piece_offset: int = 0


class Segment(NamedTuple):
    """A part of a block: ``length`` bytes of ``piece``, from ``piece_offset`` in it, which lie ``at`` bytes into the block."""

    piece: int
    piece_offset: int
    length: int
    at: int


class Block(NamedTuple):
    """The engine's unit: an aligned range of one file and the segments that fill it, or are filled from it.

    ``offset`` and ``length`` (bytes) are multiples of `ALIGNMENT`, so the last block of a file may reach past its end.
    """

    file: int
    offset: int
    length: int
    segments: tuple[Segment, ...]


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
    begins: list[int] = []
    end = 0
    for tensor in ordered:
        begins.append(end)
        end += tensor.nbytes
    return Shard(tuple(ordered), tuple(begins), end)


def blocks(extents: Iterable[Extent], block_bytes: int) -> tuple[Block, ...]:
    """Cuts ``extents`` into blocks of at most ``block_bytes``, a multiple of `ALIGNMENT`.

    Neighbouring extents of a file share blocks; a gap of a page or more starts a new one. An extent is cut only between
    elements. Extents must be sorted by file and offset. Where extents begin at an aligned offset and follow each other
    without a gap, as in a file being written, blocks do not overlap; otherwise two may read the same page.
    """
    made: list[Block] = []
    segments: list[Segment] = []
    file = start = end = -1

    def close() -> None:
        if segments:
            made.append(Block(file, start, _round_up(end - start), tuple(segments)))
            segments.clear()

    for in_file, begin, left, piece, grain, piece_offset in extents:
        offset = begin
        while left > 0:
            apart = in_file != file or offset < end or offset - end >= ALIGNMENT  # before `end`: bytes that are wanted twice
            if not segments or apart or offset - start >= block_bytes:
                close()
                file, start = in_file, offset - offset % ALIGNMENT
            room = block_bytes - (offset - start)
            length = left
            if length > room:
                # The piece begins at a whole element, so its offsets are cut at whole elements too.
                length = room - (piece_offset + room) % grain
            if length <= 0:
                close()
                continue
            segments.append(Segment(piece, piece_offset, length, offset - start))
            left -= length
            piece_offset += length
            offset += length
            end = offset
    close()
    return tuple(made)


def _round_up(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
