"""Which bytes of a block come from which boxes of which rank: the same arithmetic on all ranks, so nothing about it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from shardsave._common import boxes
from shardsave._common.layouts import Extent, Layout
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


class Share(NamedTuple):
    """Elements of a tensor that one rank gives or takes: a box that begins at index ``begin``, ``offset`` bytes after the beginning of the
    segment in which it lies. There, its strides are those of the whole tensor in C order."""

    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int


class Segment(NamedTuple):
    """The bytes ``start`` to ``start + length`` of a ``tensor``, which are in a block from byte ``at`` on.

    ``kind``: a number for each layout and size of elements.
    """

    tensor: Spread
    kind: int
    start: int
    length: int
    at: int


class Shares:
    """``run_of(owner)``: what each rank moves. ``takers(tensor, owner)``: which ranks take part in the tensor, each with which boxes;
    a rank may have several, and also the owner itself.

    Many tensors are of few kinds, and what is computed for one is kept for the others.
    """

    def __init__(self, run_of: Callable[[int], Run], takers: Callable[[Spread, int], Mapping[int, Sequence[Extent]]]) -> None:
        self._run_of = run_of
        self._takers = takers
        self._numbers: dict[tuple[Layout, int], int] = {}
        self._kinds: dict[int, list[int]] = {}  # owner → the kind of each piece
        self._firsts: dict[int, list[int]] = {}  # owner → the first segment of each block
        self._of: dict[tuple[int, int, int, int, int], tuple[Share, ...]] = {}
        self._taking: dict[tuple[int, int, int, int], tuple[tuple[int, int], ...]] = {}

    def segments(self, owner: int, block: int) -> Iterator[Segment]:
        """The segments of a block that belong to tensors."""
        run = self._run_of(owner)
        if owner not in self._firsts:
            self._kinds[owner] = [-1 if tensor is None else self._kind(tensor) for tensor in run.tensors]
            self._firsts[owner] = [*run.blocks.table[:, 3].tolist(), len(run.blocks.segments)]
        kinds, (first, stop) = self._kinds[owner], self._firsts[owner][block : block + 2]
        for piece, offset, length, at in run.blocks.segments[first:stop].tolist():
            tensor = run.tensors[piece]
            if tensor is not None:
                yield Segment(tensor, kinds[piece], run.starts[piece] + offset, length, at)

    def of(self, segment: Segment, owner: int, rank: int) -> tuple[Share, ...]:
        """The shares of ``rank`` in a segment of ``owner``, in the order in which they travel."""
        tensor, kind, start, length, _ = segment
        key = kind, owner, start, length, rank
        found = self._of.get(key)
        if found is None:
            found = self._of[key] = tuple(
                Share(begin, sizes, offset * tensor.dtype.itemsize)
                for box in self._takers(tensor, owner).get(rank, ())
                for begin, sizes, offset in meeting(tensor.layout.shape, *_elements(segment), *box)
            )
        return found

    def taking(self, owner: int, block: int) -> dict[int, int]:
        """The ranks that take part in a block, each with the bytes of its shares."""
        counts: dict[int, int] = {}
        for segment in self.segments(owner, block):
            _, kind, start, length, _ = segment
            key = kind, owner, start, length
            found = self._taking.get(key)
            if found is None:
                found = self._taking[key] = tuple(self._taking_of(segment, owner))
            for rank, nbytes in found:
                counts[rank] = counts.get(rank, 0) + nbytes
        return counts

    def _taking_of(self, segment: Segment, owner: int) -> Iterator[tuple[int, int]]:
        tensor = segment.tensor
        takers, shape = self._takers(tensor, owner), tensor.layout.shape
        for rank in near(takers, shape, *_elements(segment)):
            nbytes = sum(nbytes_of(share, tensor) for share in self.of(segment, owner, rank))
            if nbytes:
                yield rank, nbytes

    def _kind(self, tensor: Spread) -> int:
        return self._numbers.setdefault((tensor.layout, tensor.dtype.itemsize), len(self._numbers))


def nbytes_of(share: Share, tensor: Spread) -> int:
    """The bytes of a share of ``tensor``."""
    return math.prod(share.sizes) * tensor.dtype.itemsize


def _elements(segment: Segment) -> tuple[int, int]:
    """The number of the first element of a segment, and of the one after its last."""
    item = segment.tensor.dtype.itemsize
    return segment.start // item, (segment.start + segment.length) // item


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
