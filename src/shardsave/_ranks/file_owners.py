"""Which rank writes which file. A file has one writer; all ranks compute the same owners from the same shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardsave._common.layouts import Layout, Placed
from shardsave._common.spread import Spread, kinds_of
from shardsave._saving.shards import PlannedShard

#: A host may write a file if, of all its bytes, at most this part more than necessary has to come from other hosts.
_TOLERANCE = 0.1


def file_owners(shards: Sequence[PlannedShard], hosts: Sequence[int]) -> list[int]:
    """The rank that writes each shard: of the ranks on hosts that hold most of it, the least loaded; of these, one that holds most.

    Long shards are given away first, so that the last ones make loads equal. ``hosts``: the number of each rank's host. A shard with
    bytes that are no `Spread` is rank 0's.
    """
    host_of = np.array(hosts)
    load = np.zeros(len(hosts))
    parts: dict[Layout, NDArray[np.float64]] = {}
    found = [_given(shard) for shard in shards]
    free = [number for number, owner in enumerate(found) if owner is None]
    for shard, owner in zip(shards, found):
        if owner is not None:
            load[owner] += shard.layout.data_bytes
    for number in sorted(free, key=lambda number: -shards[number].layout.data_bytes):
        nbytes = shards[number].layout.data_bytes
        found[number] = owner = _least_loaded(_held(shards[number], len(hosts), parts), nbytes, host_of, load)
        load[owner] += nbytes
    return [owner for owner in found if owner is not None]


def _given(shard: PlannedShard) -> int | None:
    """The only rank that may write ``shard``; None if there is a choice."""
    if shard.owner is not None:
        return shard.owner
    return None if all(isinstance(piece, Spread) for piece in shard.pieces) else 0


def _held(shard: PlannedShard, ranks: int, parts: dict[Layout, NDArray[np.float64]]) -> NDArray[np.float64]:
    """How many bytes of ``shard`` each rank holds. ``parts``: for layouts that have been met, the part of the whole that each holds."""
    pieces = [piece for piece in shard.pieces if isinstance(piece, Spread)]
    kinds, first = kinds_of(pieces)
    held = np.zeros(ranks)
    for kind, count in Counter(kinds).items():
        piece = first[kind]
        part = parts.get(piece.layout)
        if part is None:
            part = parts[piece.layout] = _part_of_each(piece.layout, ranks)
        held += part * (count * piece.nbytes)
    return held


def _part_of_each(layout: Layout, ranks: int) -> NDArray[np.float64]:
    elements = max(1, math.prod(layout.shape))
    if isinstance(layout, Placed):
        return _elements_of_each(layout, ranks) / elements
    part = np.zeros(ranks)
    for rank in layout.ranks:
        part[rank] = sum(math.prod(sizes) for _, sizes in layout.boxes(rank)) / elements
    return part


def _elements_of_each(layout: Placed, ranks: int) -> NDArray[np.int64]:
    """How many elements each rank holds, without the boxes, of which thousands of ranks have too many."""
    grid = layout.grid
    members = np.array(grid.ranks)
    coordinates = np.unravel_index(np.arange(len(members)), grid.sizes)
    lengths = [np.full(len(members), size) for size in layout.shape]
    for split, parts, number in zip(layout.splits, grid.sizes, coordinates):
        if split.dim >= 0:
            lengths[split.dim] = _cut(lengths[split.dim], parts, number, split.groups)
    held = np.zeros(ranks, np.int64)
    held[members[members >= 0]] = math.prod(lengths, start=np.ones(len(members), np.int64))[members >= 0]
    return held


def _cut(lengths: NDArray[np.int64], parts: int, number: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """For each rank, the length of its part of each of ``groups`` of ``lengths``; all are cut as `torch.chunk` cuts."""
    size = -(-lengths // groups)
    found = np.zeros_like(lengths)
    for group in range(groups):
        length = np.clip(lengths - group * size, 0, size)
        part = -(-length // parts)
        found += np.minimum((number + 1) * part, length) - np.minimum(number * part, length)
    return found


def _least_loaded(held: NDArray[np.float64], total: int, host_of: NDArray[np.int64], load: NDArray[np.float64]) -> int:
    on_host = np.minimum(np.bincount(host_of, weights=held), total)  # a host with two replicas has no more than the whole
    candidates = np.flatnonzero(on_host[host_of] >= on_host.max() - _TOLERANCE * total)
    loads = load[candidates]
    candidates = candidates[loads == loads.min()]
    return int(candidates[held[candidates].argmax()])  # the lowest of those that hold most
