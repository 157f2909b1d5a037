"""States as each of several ranks has them, made of the state of one process; and back to whole tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch

from shardsave._common.layouts import Grid, Placed, Split
from shardsave._common.spread import Spread, local_chunks
from shardsave._state.module import Entry, State


def spread_states(state: State, size: int, seed: int = 0) -> list[State]:
    """What each of ``size`` ranks has of ``state``: every tensor is cut along some dimension, in some order of the ranks."""
    rng = random.Random(seed)
    entries: list[list[Entry]] = [[] for _ in range(size)]
    spreads: dict[str, list[Spread]] = {}
    for entry in state.entries:
        if entry.tied_to is None:
            dims = [dim for dim, n in enumerate(entry.tensor.shape) if n > 1] or [-1]
            split = Split(rng.choice(dims), rng.choice((1, 1, 2)))
            layout = Placed(Grid(rng.sample(range(size), size), (size,)), (split,), entry.tensor.shape)
            spreads[entry.name] = [_part(entry.tensor, layout, rank) for rank in range(size)]
        for rank, spread in enumerate(spreads[entry.tied_to or entry.name]):
            own = Spread(spread.dtype, spread.layout, spread.local)  # each name has a source of its own
            entries[rank].append(entry._replace(source=own))
    return [state._replace(entries=tuple(of_rank)) for of_rank in entries]


def _part(whole: torch.Tensor, layout: Placed, rank: int) -> Spread:
    local = whole.detach()
    for dim, parts in enumerate(layout._intervals(layout.grid.coordinates(rank) or ())):
        local = torch.cat([local.narrow(dim, begin, stop - begin) for begin, stop in parts] or [local.narrow(dim, 0, 0)], dim)
    return Spread(whole.dtype, layout, local_chunks(layout, rank, local.clone()))


def whole_tensor(spreads: Sequence[Any]) -> torch.Tensor:
    """The tensor of which each rank has one of ``spreads``. Each element must be where the layout says, once or as replicas."""
    first = spreads[0]
    whole = torch.zeros(first.shape, dtype=first.dtype)
    found = torch.zeros(first.shape, dtype=torch.bool)
    for rank, spread in enumerate(spreads):
        assert spread.layout == first.layout and hash(spread.layout) == hash(first.layout)
        assert [(begin, tuple(tensor.shape)) for begin, tensor in spread.local] == list(first.layout.boxes(rank))
        for begin, tensor in spread.local:
            place = tuple(slice(at, at + size) for at, size in zip(begin, tensor.shape))
            whole[place] = tensor
            found[place] = True
    assert found.all()
    assert sum(math.prod(sizes) for _, (_, sizes) in first.senders(0, [0] * len(spreads))) == whole.numel()
    return whole
