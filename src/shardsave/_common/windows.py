"""Boxes of spread tensors as tensors of their own: a chunk that lies somewhere else on disk, or a view that a library stores by itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box
from shardsave._common.layouts import Extent, Layout
from shardsave._common.spread import Spread


class Window:
    """The layout of a box of a tensor with the layout ``layout``. The box begins at index ``begin`` and has the sizes ``sizes``.

    ``dims``: for each dimension of the box as a tensor of its own, that of the whole tensor; -1 for one of size 1 that the whole does not
    have. The box has size 1 in those that are not named.
    """

    def __init__(self, layout: Layout, begin: Sequence[int], sizes: Sequence[int], dims: Sequence[int]) -> None:
        self.layout = layout
        self.begin = tuple(begin)
        self.sizes = tuple(sizes)
        self.dims = tuple(dims)
        self.shape = _in_dims(self.sizes, self.dims, 1)
        self._key = (layout, self.begin, self.sizes, self.dims)
        self._hash = hash(self._key)
        self._boxes: dict[tuple[Extent, ...], tuple[Extent, ...]] = {}

    @cached_property
    def ranks(self) -> Sequence[int]:
        return tuple(self.layout.ranks)

    def boxes(self, rank: int) -> tuple[Extent, ...]:
        of_whole = self.layout.boxes(rank)
        boxes = self._boxes.get(of_whole)
        if boxes is None:
            met = (self.meet(extent) for extent in of_whole)
            boxes = self._boxes[of_whole] = tuple(
                (_in_dims(begin, self.dims, 0), _in_dims(sizes, self.dims, 1)) for begin, sizes in filter(None, met)
            )
        return boxes

    def meet(self, extent: Extent) -> Extent | None:
        """What the box has in common with ``extent``, counted from the beginning of the box, in the dimensions of the whole."""
        first = tuple(max(0, at - start) for at, start in zip(extent[0], self.begin))
        stop = tuple(min(size, at + n - start) for at, n, start, size in zip(*extent, self.begin, self.sizes))
        if any(a >= b for a, b in zip(first, stop)):
            return None
        return first, tuple(b - a for a, b in zip(first, stop))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Window) and self._key == other._key


def window(spread: Spread, begin: Sequence[int], sizes: Sequence[int], dims: Sequence[int] | None = None) -> Spread:
    """A box of ``spread`` as a tensor of its own; the arguments are those of `Window`."""
    layout = Window(spread.layout, begin, sizes, range(len(sizes)) if dims is None else dims)
    local = []
    for at, tensor in spread.local:
        met = layout.meet((tuple(at), tuple(tensor.shape)))
        if met is not None:
            inside = tuple(first + start - own for first, start, own in zip(met[0], layout.begin, at))
            elements = _permuted(tensor[box(inside, met[1])], layout.dims)
            local.append(Chunk(_in_dims(met[0], layout.dims, 0), elements))
    return Spread(spread.dtype, layout, local)


def seen(spread: Spread, view: torch.Tensor) -> Spread | None:
    """What ``view``, a view of the stand-in of ``spread``, shows of it; None if that is no box with dimensions of the whole."""
    strides = spread.stand_in.stride()
    begin, left = [], int(view.storage_offset())
    for stride in strides:
        index, left = divmod(left, stride) if stride else (0, left)
        begin.append(index)
    sizes, dims = [1] * len(strides), []
    for size, stride in zip(view.shape, view.stride()):
        named = (d for d, (whole, length) in enumerate(zip(strides, spread.shape)) if whole == stride and length > 1)
        dim = next(named, None) if size > 1 else -1
        if dim is None or (dim in dims and dim >= 0):
            return None
        dims.append(dim)
        if dim >= 0:
            sizes[dim] = size
    if left or any(at + size > whole for at, size, whole in zip(begin, sizes, spread.shape)):
        return None
    return window(spread, begin, sizes, dims)


def _in_dims(values: Sequence[int], dims: Sequence[int], other: int) -> tuple[int, ...]:
    """``values`` in the order of ``dims``; ``other`` for those that are -1."""
    return tuple(values[dim] if dim >= 0 else other for dim in dims)


def _permuted(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The elements of a box in the dimensions ``dims``."""
    if tuple(dims) == tuple(range(tensor.dim())):
        return tensor
    named = [dim for dim in dims if dim >= 0]
    unnamed = [dim for dim in range(tensor.dim()) if dim not in named]
    tensor = tensor.permute(*named, *unnamed).flatten(len(named)).squeeze(-1) if unnamed else tensor.permute(*named)
    for position, dim in enumerate(dims):
        if dim < 0:
            tensor = tensor.unsqueeze(position)
    return tensor
