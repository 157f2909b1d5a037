"""Which rank gives which elements of a tensor to the rank that writes it, so that each element comes from one of its replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shardsave._common.layouts import Extent, Layout


def senders(layout: Layout, owner: int, hosts: Sequence[int]) -> tuple[tuple[int, Extent], ...]:
    """The boxes of ``layout`` with the rank that gives each to ``owner``: its own first, then those of its host, then the lowest rank.

    ``hosts``: the number of each rank's host. The same on all ranks.
    """
    order = sorted(layout.ranks, key=lambda rank: (rank != owner, hosts[rank] != hosts[owner], rank))
    given: list[tuple[int, Extent]] = []
    seen: set[Extent] = set()
    left = math.prod(layout.shape)
    for rank in order:
        if not left:
            break
        for box in layout.boxes(rank):
            if box not in seen:
                seen.add(box)
                for rest in _without(box, [other for _, other in given]):
                    given.append((rank, rest))
                    left -= math.prod(rest[1])
    return tuple(given)


def _without(box: Extent, others: Sequence[Extent]) -> Iterator[Extent]:
    """What is left of ``box`` without ``others``, as boxes."""
    for number, other in enumerate(others):
        first = [max(a, b) for a, b in zip(box[0], other[0])]
        stop = [min(a + n, b + m) for a, n, b, m in zip(*box, *other)]
        if all(a < b for a, b in zip(first, stop)):
            for part in _around(box, first, stop):
                yield from _without(part, others[number + 1 :])
            return
    yield box


def _around(box: Extent, first: Sequence[int], stop: Sequence[int]) -> Iterator[Extent]:
    """What is left of ``box`` without the indices from ``first`` to ``stop`` within it: at most two boxes for each dimension."""
    begin, end = list(box[0]), [at + size for at, size in zip(*box)]
    for dim in range(len(begin)):
        for low, high in ((begin[dim], first[dim]), (stop[dim], end[dim])):
            if low < high:
                starts, ends = [*begin], [*end]
                starts[dim], ends[dim] = low, high
                yield tuple(starts), tuple(b - a for a, b in zip(starts, ends))
        begin[dim], end[dim] = first[dim], stop[dim]
