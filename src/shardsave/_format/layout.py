"""Which tensor goes into which shard, and at which offset: layout arithmetic, no I/O.

Everything here is a pure function of the stored tensors, so every process that sees the same tensors plans the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from shardsave._format.dtypes import item_bytes

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
