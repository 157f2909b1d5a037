"""Spread tensors that are made of others without a copy: what a view of the whole is in the parts of this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardsave._common.assembled import Chunk
from shardsave._common.derived_layouts import Concatenated, Region, Viewed, shifted
from shardsave._common.layouts import overlap
from shardsave._common.spread import Spread


def viewed(spread: Spread, region: Region) -> Spread:
    """The ``region`` of ``spread``."""
    chunks = []
    for chunk in spread.local:
        place = region.place((chunk.begin, tuple(chunk.tensor.shape)))
        if place is not None:
            chunks.append(Chunk(place[0], _view(chunk, region)))
    return Spread(spread.dtype, Viewed(spread.layout, region), chunks)


def concatenated(spreads: Sequence[Spread], dim: int) -> Spread:
    """``spreads``, which have one dtype, one after the other along the dimension ``dim``."""
    chunks, before = [], 0
    for spread in spreads:
        chunks += [Chunk(shifted(chunk.begin, dim, before), chunk.tensor) for chunk in spread.local]
        before += spread.shape[dim]
    return Spread(spreads[0].dtype, Concatenated(tuple(spread.layout for spread in spreads), dim), chunks)


def region_of(view: torch.Tensor, whole: torch.Tensor) -> Region | None:
    """The region of ``whole``, a contiguous tensor, that ``view``, another view of its memory, has; None if it is none."""
    shape, strides = tuple(whole.shape), whole.stride()
    dims: list[int] = []
    sizes = [1] * whole.dim()
    for size, stride in zip(view.shape, view.stride()):
        found = -1
        if size != 1:
            candidates = [d for d, n in enumerate(shape) if n > 1 and strides[d] == stride and d not in dims]
            if not candidates:
                return None
            found = candidates[0]
            sizes[found] = size
        dims.append(found)
    left = int(view.storage_offset() - whole.storage_offset())
    begin = [0] * whole.dim()
    for dim, size in enumerate(shape):  # strides of a contiguous tensor descend
        if size > 1:
            begin[dim], left = divmod(left, strides[dim])
    inside = left == 0 and all(at >= 0 and at + size <= n for at, size, n in zip(begin, sizes, shape))
    return Region(tuple(begin), tuple(sizes), tuple(dims)) if inside else None


def _view(chunk: Chunk, region: Region) -> torch.Tensor:
    """Those elements of ``chunk`` that are in ``region``; there must be some."""
    common = overlap((chunk.begin, tuple(chunk.tensor.shape)), (region.begin, region.sizes))
    assert common is not None
    view = chunk.tensor[tuple(slice(at - first, at - first + n) for at, first, n in zip(common[0], chunk.begin, common[1]))]
    kept = [dim for dim in region.dims if dim >= 0]
    view = view.permute(*kept, *(dim for dim in range(view.dim()) if dim not in kept))
    for _ in range(view.dim() - len(kept)):
        view = view.squeeze(-1)
    for position, dim in enumerate(region.dims):
        if dim < 0:
            view = view.unsqueeze(position)
    return view
