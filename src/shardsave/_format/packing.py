"""Which tensor is stored in which shard, and at which offset: arithmetic only, no I/O.

Everything here is a pure function of the stored tensors: every process that has the same tensors plans the same files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from shardsave._format.dtypes import item_bytes

#: The data of a file begins at a multiple of this, in bytes, and blocks are cut at multiples of it: no file system asks for more
#: with O_DIRECT (open(2), statx(2)).
ALIGNMENT = 4096


class StoredTensor(NamedTuple):
    """A tensor in a file: ``dtype`` and ``shape`` as in the header; ``frozen`` and trainable tensors are packed apart."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    frozen: bool = False


class Shard(NamedTuple):
    """The tensors of one file in file order; ``begins``: where each begins, in bytes from the start of the data."""

    tensors: tuple[StoredTensor, ...]
    begins: tuple[int, ...]
    data_bytes: int


def pack(tensors: Sequence[StoredTensor], max_shard_size: int) -> tuple[Shard, ...]:
    """Distributes ``tensors`` over shards of at most ``max_shard_size`` bytes of data; frozen and trainable tensors are kept apart.

    Greedy, in the order of ``tensors``; a tensor larger than the bound has a shard of its own. Between two repeated layers
    (``layers.3.`` and ``layers.4.``) a shard ends early if it is at least three quarters full: a layer stays in one file if that
    costs only a little room. Without tensors there is one empty shard.
    """
    groups: list[list[StoredTensor]] = []
    for frozen in (True, False):
        alike = [tensor for tensor in tensors if tensor.frozen == frozen]
        if alike:
            groups.extend(_greedy(alike, max_shard_size))
    return tuple(_lay_out(group) for group in groups) or (_lay_out([]),)


def _greedy(tensors: Iterable[StoredTensor], bound: int) -> list[list[StoredTensor]]:
    groups: list[list[StoredTensor]] = []
    current: list[StoredTensor] = []
    room = bound
    for tensor in tensors:
        nearly_full = bool(current) and room <= bound // 4
        at_boundary = nearly_full and _repeated_layer(tensor.name) != _repeated_layer(current[-1].name)
        if current and (tensor.nbytes > room or at_boundary):
            groups.append(current)
            current, room = [], bound
        current.append(tensor)
        room -= tensor.nbytes
    if current:
        groups.append(current)
    return groups


def _repeated_layer(name: str) -> str | None:
    """``layers.3.mlp.weight`` → ``layers.3``: the name up to its first number; None without a number."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: depth + 1])
    return None


def _lay_out(tensors: Sequence[StoredTensor]) -> Shard:
    align = {dtype: -item_bytes(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    ordered = sorted(tensors, key=lambda tensor: align[tensor.dtype])  # stable: tensors of one alignment stay in state order
    *begins, end = accumulate((tensor.nbytes for tensor in ordered), initial=0)
    return Shard(tuple(ordered), tuple(begins), end)
