"""Boxes of spread tensors: what a chunk that lies somewhere else on disk is for the ranks that hold the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box
from shardsave._common.layouts import Extent, Layout
from shardsave._common.spread import Spread


class Window:
    """The layout of a box of a tensor that has the layout ``layout``. The box begins at index ``begin``."""

    def __init__(self, layout: Layout, begin: tuple[int, ...], shape: tuple[int, ...]) -> None:
        self.layout = layout
        self.begin = begin
        self.shape = shape
        self._hash = hash((layout, begin, shape))
        self._boxes: dict[tuple[Extent, ...], tuple[Extent, ...]] = {}

    @cached_property
    def ranks(self) -> Sequence[int]:
        return tuple(self.layout.ranks)

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        of_whole = self.layout.boxes(rank)
        boxes = self._boxes.get(of_whole)
        if boxes is None:
            met = (_meet(extent, self.begin, self.shape) for extent in of_whole)
            boxes = self._boxes[of_whole] = tuple(extent for extent in met if extent is not None)
        return boxes

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and (self.layout, self.begin, self.shape) == (other.layout, other.begin, other.shape)


def window(spread: Spread, begin: Sequence[int], shape: Sequence[int]) -> Spread:
    """The box of ``spread`` that begins at index ``begin``, as a tensor of its own."""
    begin, shape = tuple(begin), tuple(shape)
    local = []
    for at, tensor in spread.local:
        met = _meet((at, tuple(tensor.shape)), begin, shape)
        if met is not None:
            inside = tuple(first + start - own for first, start, own in zip(met[0], begin, at))
            local.append(Chunk(met[0], tensor[box(inside, met[1])]))
    return Spread(spread.dtype, Window(spread.layout, begin, shape), local)


def _meet(extent: Extent, begin: Sequence[int], shape: Sequence[int]) -> Extent | None:
    """What ``extent`` has in common with the box, from the box's own beginning on."""
    first = tuple(max(0, at - start) for at, start in zip(extent[0], begin))
    stop = tuple(min(size, at + n - start) for at, n, start, size in zip(*extent, begin, shape))
    if any(a >= b for a, b in zip(first, stop)):
        return None
    return first, tuple(b - a for a, b in zip(first, stop))
