"""Where the sources of a join go if its targets are distributed over several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch

from shardsave._common.spread import Spread
from shardsave._common.spread_views import region_of, viewed
from shardsave._loading.slots import Slot


def parts_seen(views: Sequence[torch.Tensor], slots: Sequence[Slot]) -> Sequence[Union[torch.Tensor, Spread]] | None:
    """``views`` of the forms of ``slots``; of a form that stands for a distributed tensor, what this rank has of the view.

    None if a view is no box of such a tensor.
    """
    spreads = {_storage_of(slot.form): slot.part.spread for slot in slots if slot.part is not None}
    if not spreads:
        return views
    found: list[Union[torch.Tensor, Spread]] = []
    for view in views:
        spread = spreads.get(_storage_of(view))
        if spread is None:
            found.append(view)
            continue
        region = region_of(view, spread.stand_in)
        if region is None:
            return None
        found.append(viewed(spread, region))
    return found


def _storage_of(tensor: torch.Tensor) -> object:
    return tensor.untyped_storage()._cdata
