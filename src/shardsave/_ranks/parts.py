"""Which bytes of a block come from which boxes of which rank: the same arithmetic on all ranks, so nothing about it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shardsave._common import boxes
from shardsave._common.layouts import Extent
from shardsave._common.spread import Spread
from shardsave._engine.blocks import Blocks

#: From so many boxes on, those that may meet a range are found in numpy.
_MANY = 16


class Run(NamedTuple):
    """What the engine of one rank moves. For each piece of ``blocks``: ``tensors``, the tensor that it belongs to, or None if other ranks
    have no part in it; ``starts``: the byte of the tensor at which it begins."""

    blocks: Blocks
    tensors: Sequence[Spread | None]
    starts: Sequence[int]


class Part(NamedTuple):
    """Elements of a ``tensor`` that one rank gives or takes: a box that begins at index ``begin``. In the block, its first element is at
    byte ``at``, and the strides are those of the whole tensor in C order."""

    tensor: Spread
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.tensor.dtype.itemsize


class Parts:
    """``run_of(owner)``: what each rank moves. ``takers(tensor, owner)``: which ranks take part in the tensor, each with which boxes;
    a rank may have several, and also the owner itself."""

    def __init__(
        self, run_of: Callable[[int], Run], takers: Callable[[Spread, int], Mapping[int, Sequence[Extent]]]
    ) -> None:
        self._run_of = run_of
        self._takers = takers
        self._starts: dict[int, list[int]] = {}

    def of(self, owner: int, block: int, rank: int) -> Iterator[Part]:
        """The parts of ``rank`` in a block of ``owner``, in the order in which they travel."""
        for tensor, first, stop, at in self._segments(owner, block):
            item = tensor.dtype.itemsize
            for begin, sizes in self._takers(tensor, owner).get(rank, ()):
                for part, counts, offset in meeting(tensor.layout.shape, first, stop, begin, sizes):
                    yield Part(tensor, part, counts, at + offset * item)

    def taking(self, owner: int, block: int) -> dict[int, int]:
        """The ranks that take part in a block, each with the bytes of its parts."""
        counts: dict[int, int] = {}
        for tensor, first, stop, _ in self._segments(owner, block):
            takers = self._takers(tensor, owner)
            for rank in near(takers, tensor.layout.shape, first, stop):
                met = sum(
                    math.prod(part[1])
                    for begin, sizes in takers[rank]
                    for part in meeting(tensor.layout.shape, first, stop, begin, sizes)
                )
                if met:
                    counts[rank] = counts.get(rank, 0) + met * tensor.dtype.itemsize
        return counts

    def _segments(self, owner: int, block: int) -> Iterator[tuple[Spread, int, int, int]]:
        """The segments of a block that belong to tensors: the tensor, its first element and the one after its last, where it is."""
        run = self._run_of(owner)
        firsts = self._starts.get(owner)
        if firsts is None:
            firsts = self._starts[owner] = [*run.blocks.table[:, 3].tolist(), len(run.blocks.segments)]
        for piece, offset, length, at in run.blocks.segments[firsts[block] : firsts[block + 1]].tolist():
            tensor = run.tensors[piece]
            if tensor is not None:
                item, start = tensor.dtype.itemsize, run.starts[piece] + offset
                yield tensor, start // item, (start + length) // item, at


class _Bounds:
    """The first dimension of the boxes of many ranks, for `near`."""

    def __init__(self, takers: Mapping[int, Sequence[Extent]]) -> None:
        rows = [(rank, begin[0], begin[0] + sizes[0]) for rank, held in takers.items() for begin, sizes in held]
        self.rank, self.begin, self.stop = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        self.takers = takers


_bounds: dict[int, _Bounds] = {}


def near(takers: Mapping[int, Sequence[Extent]], shape: Sequence[int], first: int, stop: int) -> Sequence[int]:
    """The ranks whose boxes may meet elements ``first`` to ``stop``."""
    if len(takers) < _MANY or not shape:
        return [*takers]
    bounds = _bounds.get(id(takers))
    if bounds is None or bounds.takers is not takers:
        if len(_bounds) > 1 << 10:
            _bounds.clear()
        bounds = _bounds[id(takers)] = _Bounds(takers)
    row = max(1, math.prod(shape[1:]))
    meets = (bounds.begin <= (stop - 1) // row) & (bounds.stop > first // row)
    return [*dict.fromkeys(bounds.rank[meets].tolist())]


@lru_cache(maxsize=1 << 16)
def meeting(
    shape: tuple[int, ...], first: int, stop: int, begin: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
    """What a box has of the elements ``first`` to ``stop`` in C order, as boxes: where each begins, its sizes, and how many elements after
    ``first`` it begins."""
    strides = element_strides(shape)
    found = []
    for box in boxes.boxes(shape, first, stop):
        low = tuple(max(rows.start, at) for rows, at in zip(box, begin)) + begin[len(box) :]
        high = tuple(min(rows.stop, at + n) for rows, at, n in zip(box, begin, sizes))
        high += tuple(at + n for at, n in zip(begin[len(box) :], sizes[len(box) :]))
        if all(a < b for a, b in zip(low, high)):
            offset = sum(at * stride for at, stride in zip(low, strides)) - first
            found.append((low, tuple(b - a for a, b in zip(low, high)), offset))
    return tuple(found)


@lru_cache(maxsize=1 << 12)
def element_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of ``shape`` in C order, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
