"""Layouts of tensors that are made of others without a copy: a part of one, with its dimensions in another order, or several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardsave._common.layouts import Extent, Layout, overlap


class Region(NamedTuple):
    """A box of a tensor, as a tensor. ``dims``: for each of its dimensions, that of the tensor; -1 for a new one of size 1.

    Dimensions that are not in ``dims`` have size 1 in the box.
    """

    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    dims: tuple[int, ...]

    @classmethod
    def box(cls, begin: Sequence[int], sizes: Sequence[int]) -> Region:
        """The box of ``sizes`` that begins at index ``begin``, with the dimensions of the tensor."""
        return cls(tuple(begin), tuple(sizes), tuple(range(len(sizes))))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[dim] if dim >= 0 else 1 for dim in self.dims)

    def place(self, box: Extent) -> Extent | None:
        """Where those elements of ``box`` that are in the region are in it; None if there are none."""
        common = overlap(box, (self.begin, self.sizes))
        if common is None:
            return None
        begin = tuple(common[0][dim] - self.begin[dim] if dim >= 0 else 0 for dim in self.dims)
        return begin, tuple(common[1][dim] if dim >= 0 else 1 for dim in self.dims)


class Viewed:
    """The layout of a ``region`` of a tensor that has the layout ``whole``."""

    def __init__(self, whole: Layout, region: Region) -> None:
        self.whole = whole
        self.region = region
        self.shape = region.shape
        self.ranks = whole.ranks
        self._hash = hash((whole, region))
        self._boxes: dict[tuple[Extent, ...], tuple[Extent, ...]] = {}  # by the boxes of the whole

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        of_whole = self.whole.boxes(rank)
        boxes = self._boxes.get(of_whole)
        if boxes is None:
            places = (self.region.place(box) for box in of_whole)
            boxes = self._boxes[of_whole] = tuple(place for place in places if place is not None)
        return boxes

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Viewed) and self._hash == other._hash and (self.whole, self.region) == (other.whole, other.region)
        )


class Concatenated(NamedTuple):
    """The layout of tensors with the layouts ``parts`` that follow one another along the dimension ``dim``."""

    parts: tuple[Layout, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.parts), *first[self.dim + 1 :])

    @property
    def ranks(self) -> Sequence[int]:
        return sorted({rank for part in self.parts for rank in part.ranks})

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        boxes, before = [], 0
        for part in self.parts:
            boxes += [(shifted(begin, self.dim, before), sizes) for begin, sizes in part.boxes(rank)]
            before += part.shape[self.dim]
        return tuple(boxes)


def shifted(begin: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return (*begin[:dim], begin[dim] + by, *begin[dim + 1 :])
