"""Tensors on disk of a transformers model whose tensors are spread over ranks: which elements of which ranks they consist of."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shardsave._common.derived_layouts import Region
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._common.spread_views import concatenated, region_of, viewed
from shardsave._huggingface.transformers_on_disk import DiskTensor, storage_of
from shardsave._state.module import Entry
from shardsave._state.savable import refuse


def spread_on_disk(name: str, part: DiskTensor, sources: Iterable[Spread]) -> Spread:
    """The tensor ``part``, which was made of the stand-ins of ``sources``, of the elements that ranks hold of these; nothing is copied.

    Raises UnsupportedTensorError, with the ``name`` on disk, if more was done than to cut and join.
    """
    spreads = {storage_of(source.stand_in): source for source in sources}

    def made(tensor: torch.Tensor) -> Spread:
        storage = storage_of(tensor)
        if storage in spreads:
            whole, spread = spreads[storage].stand_in, spreads[storage]
        elif storage in part.joins:
            whole, tensors, dim, is_stack = part.joins[storage]
            spread = concatenated([_unsqueezed(made(one), dim) if is_stack else made(one) for one in tensors], dim)
        else:
            refuse(name, "a tensor that is split, joined or stacked on its way to disk was expected", _FOUND)
        if (tensor.shape, tensor.stride()) == (whole.shape, whole.stride()):
            return spread
        region = region_of(tensor, whole) if whole.is_contiguous() else None
        if region is None:
            refuse(name, "a tensor that is split, joined or stacked on its way to disk was expected", _FOUND)
        return viewed(spread, region)

    return made(part.tensor)


def computed_source(name: str, tensor: torch.Tensor, entries: Iterable[Entry]) -> ByteSource:
    """The bytes of ``tensor``, called ``name`` on disk, which PEFT returned for ``entries``.

    Raises UnsupportedTensorError if it was computed of tensors that are spread over ranks.
    """
    spreads = {id(entry.tensor): entry.source for entry in entries if isinstance(entry.source, Spread)}
    if not spreads:
        return TensorSource.of(tensor)
    if id(tensor) not in spreads:
        refuse(
            name,
            "a tensor of the module was expected",
            "PEFT computes it, for which it needs a model that is whole in this process",
        )
    return spreads[id(tensor)]


_FOUND = "transformers computes it in another way, for which a whole model is needed: save the full state dict"


def _unsqueezed(spread: Spread, dim: int) -> Spread:
    shape = spread.shape
    dims = [*range(len(shape))]
    return viewed(spread, Region((0,) * len(shape), shape, (*dims[:dim], -1, *dims[dim:])))
