"""Which rank gives which elements of a tensor to the rank that writes it, so that each element comes from one of its replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from shardsave._common.coverage import covered_once
from shardsave._common.derived_layouts import Viewed
from shardsave._common.layouts import Extent, Layout, LowestOnly, Placed, Whole, without


def senders(layout: Layout, owner: int, hosts: Sequence[int]) -> tuple[tuple[int, Extent], ...]:
    """The boxes of ``layout`` with the rank that gives each to ``owner``: its own first, then those of its host, then the lowest rank.

    ``hosts``: the number of each rank's host. The same on all ranks.
    """
    holding = holders(layout)
    if holding is not None:
        given = [(_chosen(ranks, owner, hosts), box) for box, ranks in holding.items()]
    else:
        given = list(_of_overlapping(layout, owner, hosts))
    return tuple(sorted(given, key=lambda part: (part[0] != owner, hosts[part[0]] != hosts[owner], part[0])))


@lru_cache(maxsize=1024)
def holders(layout: Layout) -> Mapping[Extent, Sequence[int]] | None:
    """Each box of ``layout`` with the ranks that hold it, ascending; None if some boxes may overlap without being equal."""
    if isinstance(layout, Viewed):
        whole = holders(layout.whole)
        if whole is None:
            return None
        places = ((layout.region.place(box), ranks) for box, ranks in whole.items())
        return {place: ranks for place, ranks in places if place is not None}
    if isinstance(layout, Whole):
        return dict.fromkeys(layout.boxes(layout.ranks[0]), layout.ranks) if layout.ranks else {}
    holding: dict[Extent, list[int]] = {}
    for rank in sorted(layout.ranks):
        for box in layout.boxes(rank):
            holding.setdefault(box, []).append(rank)
    apart = isinstance(layout, (Placed, LowestOnly)) or covered_once(layout.shape, list(holding))
    return holding if apart else None


def _chosen(ranks: Sequence[int], owner: int, hosts: Sequence[int]) -> int:
    if owner in ranks:
        return owner
    if len(ranks) == 1:
        return ranks[0]
    return next((rank for rank in ranks if hosts[rank] == hosts[owner]), ranks[0])


def _of_overlapping(layout: Layout, owner: int, hosts: Sequence[int]) -> Iterator[tuple[int, Extent]]:
    order = sorted(layout.ranks, key=lambda rank: (rank != owner, hosts[rank] != hosts[owner], rank))
    given: list[Extent] = []
    for rank in order:
        for box in layout.boxes(rank):
            if box not in given:
                parts = list(without(box, given))
                given += parts
                yield from ((rank, part) for part in parts)
