"""Which rank gives which elements of a tensor to the rank that writes it, so that each element comes from one of its replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardsave._common.layouts import Extent, Layout, without


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
                for rest in without(box, [other for _, other in given]):
                    given.append((rank, rest))
                    left -= math.prod(rest[1])
    return tuple(given)
