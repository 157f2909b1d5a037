"""Layouts: which rank of a group holds which elements of a tensor. All ranks compute the same boxes from the same layout.

The arithmetic is that of torch's DTensor: a dimension is cut as `torch.chunk` cuts it, and a rank may hold several boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

#: The index at which a box begins, and its sizes.
Extent = tuple[tuple[int, ...], tuple[int, ...]]

#: The parts of one dimension that a rank holds: first index and stop of each, ascending.
Intervals = tuple[tuple[int, int], ...]


class Layout(Protocol):
    """Where the elements of one tensor are. Equal on all ranks, hashable, small; ranks are positions in the group."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that have the tensor; some of them may hold no element of it."""

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        """The boxes that ``rank`` holds, which do not overlap; none if it holds nothing."""

    def __hash__(self) -> int: ...


class Inside(NamedTuple):
    """The box that begins at index ``begin`` of the whole is at ``place`` in the local tensor of a rank."""

    begin: tuple[int, ...]
    place: tuple[slice, ...]


class Shared(NamedTuple):
    """A box of which each of ``holders``, two ranks or more, has the elements."""

    holders: Sequence[int]
    box: Extent


class Split(NamedTuple):
    """How a tensor is placed along one dimension of a mesh. ``dim`` -1: each rank along it holds the same.

    Otherwise dimension ``dim`` of the tensor is first cut into ``groups``, and each rank holds its part of each of them.
    """

    dim: int
    groups: int = 1


class Grid:
    """The ranks of a mesh, in C order; -1 for processes that are not in the group."""

    def __init__(self, ranks: Sequence[int], sizes: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.sizes = tuple(sizes)
        self._place = {rank: place for place, rank in enumerate(self.ranks) if rank >= 0}
        self._hash = hash((self.ranks, self.sizes))

    def coordinates(self, rank: int) -> tuple[int, ...] | None:
        """Where ``rank`` is in the mesh; None if it is not."""
        place = self._place.get(rank)
        if place is None:
            return None
        found = []
        for size in reversed(self.sizes):
            place, coordinate = divmod(place, size)
            found.append(coordinate)
        return tuple(reversed(found))

    def replicas(self, rank: int, splits: Sequence[Split]) -> tuple[int, ...]:
        """The ranks that hold the same elements as ``rank``, which is one of them, if a tensor is placed as ``splits`` say."""
        coordinates = self.coordinates(rank)
        assert coordinates is not None
        place = tuple(slice(None) if split.dim < 0 else at for at, split in zip(coordinates, splits))
        found = np.array(self.ranks).reshape(self.sizes)[place].flatten()
        return tuple(sorted(found[found >= 0].tolist()))

    @property
    def members(self) -> Sequence[int]:
        """The ranks of the group that are in the mesh."""
        return self._place.keys()  # type: ignore[return-value]

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Grid) and self._hash == other._hash and (self.ranks, self.sizes) == (other.ranks, other.sizes)
        )


class Placed:
    """A tensor that is distributed over a mesh, as a DTensor is. ``splits``: one for each dimension of the mesh."""

    def __init__(self, grid: Grid, splits: Sequence[Split], shape: Sequence[int]) -> None:
        self.grid = grid
        self.splits = tuple(splits)
        self.shape = tuple(shape)
        self._hash = hash((grid, self.splits, self.shape))
        self._boxes: dict[tuple[int, ...], tuple[Extent, ...]] = {}  # by the coordinates that matter
        self._local: dict[int, tuple[tuple[int, ...], tuple[Inside, ...]]] = {}
        self.ranks: Sequence[int] = tuple(sorted(grid.members))

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        coordinates = self.grid.coordinates(rank)
        if coordinates is None:
            return ()
        part = self.part(coordinates)
        boxes = self._boxes.get(part)
        if boxes is None:
            boxes = self._boxes[part] = tuple(_boxes(self._intervals(coordinates)))
        return boxes

    def part(self, coordinates: Sequence[int]) -> tuple[int, ...]:
        """Equal for ranks that hold the same elements, their replicas."""
        return tuple(at if split.dim >= 0 else 0 for at, split in zip(coordinates, self.splits))

    def local(self, rank: int) -> tuple[tuple[int, ...], tuple[Inside, ...]]:
        """The shape of the local tensor of ``rank``, and where each of its boxes is in it."""
        found = self._local.get(rank)
        if found is None:
            coordinates = self.grid.coordinates(rank)
            intervals = self._intervals(coordinates) if coordinates is not None else ((),) * len(self.shape)
            sizes = tuple(sum(stop - begin for begin, stop in parts) for parts in intervals)
            places = itertools.product(*map(_consecutive, intervals)) if coordinates is not None else ()
            inside = tuple(Inside(begin, place) for (begin, _), place in zip(self.boxes(rank), places))
            found = self._local[rank] = (sizes, inside)
        return found

    def _intervals(self, coordinates: Sequence[int]) -> tuple[Intervals, ...]:
        dims: list[Intervals] = [((0, size),) if size else () for size in self.shape]
        for split, parts, at in zip(self.splits, self.grid.sizes, coordinates):
            if split.dim >= 0:
                dims[split.dim] = _part(dims[split.dim], parts, at, split.groups)
        return tuple(dims)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Placed)
            and self._hash == other._hash
            and (self.grid, self.splits, self.shape) == (other.grid, other.splits, other.shape)
        )


class Whole(NamedTuple):
    """A tensor that each of ``ranks`` holds as a whole."""

    ranks: Sequence[int]
    shape: tuple[int, ...]

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        return _whole(self.shape) if rank in self.ranks else ()


class Listed:
    """A tensor of which each rank lists its boxes itself. ``by_rank``: rank → its boxes."""

    def __init__(self, by_rank: Mapping[int, Sequence[Extent]], shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self._by_rank = {rank: tuple(by_rank[rank]) for rank in sorted(by_rank)}
        self._hash = hash((self.shape, tuple(self._by_rank.items())))
        self.ranks: Sequence[int] = tuple(self._by_rank)

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        return self._by_rank.get(rank, ())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listed) and (self.shape, self._by_rank) == (other.shape, other._by_rank)


class Joined:
    """A tensor of whose placement not all ranks say the same. ``which``: for each rank the number of its layout, -1 if it has none."""

    def __init__(self, layouts: Sequence[Layout], which: Sequence[int]) -> None:
        self.shape = layouts[0].shape
        self._layouts = tuple(layouts)
        self._which = tuple(which)
        self._hash = hash((self._layouts, self._which))
        self.ranks: Sequence[int] = tuple(rank for rank, number in enumerate(self._which) if number >= 0)

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        number = self._which[rank] if rank < len(self._which) else -1
        return self._layouts[number].boxes(rank) if number >= 0 else ()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Joined)
            and self._hash == other._hash
            and (self._layouts, self._which) == (other._layouts, other._which)
        )


class LowestOnly:
    """A layout without the replicas: of ranks that hold the same elements, only the lowest counts as one that has them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.shape = layout.shape
        self.ranks = layout.ranks
        self._boxes: dict[int, tuple[Extent, ...]] = {}
        given: list[Extent] = []
        for rank in layout.ranks:
            self._boxes[rank] = tuple(part for box in layout.boxes(rank) for part in without(box, given))
            given += self._boxes[rank]

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        return self._boxes.get(rank, ())

    def __hash__(self) -> int:
        return hash((LowestOnly, self.layout))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowestOnly) and self.layout == other.layout


def without(box: Extent, others: Sequence[Extent]) -> Iterator[Extent]:
    """What is left of ``box`` without ``others``, as boxes."""
    for number, other in enumerate(others):
        if (common := overlap(box, other)) is not None:
            for part in _around(box, common):
                yield from without(part, others[number + 1 :])
            return
    yield box


def overlap(box: Extent, other: Extent) -> Extent | None:
    """The elements that two boxes have in common; None if there are none."""
    first = tuple(max(a, b) for a, b in zip(box[0], other[0]))
    sizes = tuple(min(a + n, b + m) - at for a, n, b, m, at in zip(*box, *other, first))
    return (first, sizes) if all(size > 0 for size in sizes) else None


def _around(box: Extent, inner: Extent) -> Iterator[Extent]:
    """What is left of ``box`` without ``inner``, a box within it: at most two boxes for each dimension."""
    begin, end = list(box[0]), [at + size for at, size in zip(*box)]
    for dim, (first, size) in enumerate(zip(*inner)):
        for low, high in ((begin[dim], first), (first + size, end[dim])):
            if low < high:
                starts, ends = [*begin], [*end]
                starts[dim], ends[dim] = low, high
                yield tuple(starts), tuple(b - a for a, b in zip(starts, ends))
        begin[dim], end[dim] = first, first + size


@lru_cache(maxsize=1024)
def _whole(shape: tuple[int, ...]) -> tuple[Extent, ...]:
    return (((0,) * len(shape), shape),) if math.prod(shape) else ()


def _boxes(intervals: Sequence[Intervals]) -> Iterator[Extent]:
    """The products of the parts of each dimension, in C order."""
    for parts in itertools.product(*intervals):
        yield tuple(begin for begin, _ in parts), tuple(stop - begin for begin, stop in parts)


def _consecutive(intervals: Intervals) -> Iterator[slice]:
    """Where ``intervals`` are in a local tensor, in which one follows the other."""
    at = 0
    for begin, stop in intervals:
        yield slice(at, at := at + stop - begin)


def _part(intervals: Intervals, parts: int, number: int, groups: int) -> Intervals:
    """Part ``number`` of ``parts`` of each of ``groups`` of the indices in ``intervals``; all are cut as `torch.chunk` cuts."""
    total = sum(stop - begin for begin, stop in intervals)
    size = -(-total // groups)
    found: list[tuple[int, int]] = []
    for first in range(0, total, size) if size else ():
        length = min(size, total - first)
        part = -(-length // parts)
        begin, stop = min(number * part, length), min((number + 1) * part, length)
        for piece in _cut(intervals, first + begin, first + stop):
            if found and found[-1][1] == piece[0]:
                piece = (found.pop()[0], piece[1])
            found.append(piece)
    return tuple(found)


def _cut(intervals: Intervals, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Of the indices in ``intervals``, those that are counted ``first`` to ``stop``."""
    counted = 0
    for begin, end in intervals:
        low, high = max(first - counted, 0), min(stop - counted, end - begin)
        if low < high:
            yield begin + low, begin + high
        counted += end - begin
