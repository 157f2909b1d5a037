"""How the bytes of one stored tensor are divided among the ranks that need elements of it: which rank reads what, and for whom.

Long runs of bytes that one rank alone needs are read by it, straight into place. Everything else (columns, replicas, small tensors) is
cut into common ranges: one of the ranks that need something of a range reads it, and sends the others what they need. So no byte is
read twice, and no file is read in small pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

from shardsave._common.boxes import boxes
from shardsave._common.layouts import Extent, Layout

#: Runs of fewer bytes are not read alone: a direct read takes whole pages, so short ones would read too much.
LONE_BYTES = 256 << 10

#: The most bytes of one stored tensor in a common range.
COMMON_BYTES = 4 << 20


class CommonRange(NamedTuple):
    """Bytes ``begin`` to ``end`` of a stored tensor. ``needs``: rank → how many of them it needs; empty if nobody does."""

    begin: int
    end: int
    needs: Mapping[int, int]


class Division(NamedTuple):
    """``alone``: rank → the ranges of bytes that it reads for itself. ``common``: the other ranges, in order."""

    alone: Mapping[int, Sequence[tuple[int, int]]]
    common: Sequence[CommonRange]


@lru_cache(maxsize=4096)
def divide(layout: Layout, item: int) -> Division:
    """The division of a stored tensor with elements of ``item`` bytes, of which ``layout`` says who needs what."""
    alone: dict[int, list[tuple[int, int]]] = {}
    shared: list[CommonRange] = []
    shape = layout.shape
    for first, stop, ranks in _intervals(layout, max(1, LONE_BYTES // item)):
        if len(ranks) == 1:
            alone.setdefault(ranks[0], []).append((first * item, stop * item))
            continue
        step = max(1, COMMON_BYTES // item)
        for begin in range(first, stop, step):
            end = min(begin + step, stop)
            counts = ((rank, _needed(layout.boxes(rank), shape, begin, end)) for rank in ranks)
            shared.append(CommonRange(begin * item, end * item, {rank: count * item for rank, count in counts if count}))
    return Division(alone, tuple(shared))


def _intervals(layout: Layout, lone: int) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Ranges of elements that together are the whole tensor, each with the ranks that may need something of it, in order.

    Neighbouring ranges that several ranks need are joined as long as they have fewer than ``lone`` elements.
    """
    shape = layout.shape
    starts: dict[int, list[int]] = {}
    stops: dict[int, list[int]] = {}
    for rank in layout.ranks:
        for first, stop in _runs_of(layout.boxes(rank), shape, lone):
            starts.setdefault(first, []).append(rank)
            stops.setdefault(stop, []).append(rank)
    total = math.prod(shape)
    active: set[int] = set()
    pending: tuple[int, int, set[int]] | None = None
    cuts = sorted({0, total, *starts, *stops})
    for first, stop in pairwise(cuts):
        active.difference_update(stops.get(first, ()))
        active.update(starts.get(first, ()))
        if pending is not None and (len(active) < 2 or stop - pending[0] > lone) and pending[2] != active:
            yield pending[0], pending[1], sorted(pending[2])
            pending = None
        if len(active) < 2:
            yield first, stop, sorted(active)
        else:
            pending = (first, stop, set(active)) if pending is None else (pending[0], stop, pending[2] | active)
    if pending is not None:
        yield pending[0], pending[1], sorted(pending[2])


def _runs_of(extents: Sequence[Extent], shape: Sequence[int], lone: int) -> list[tuple[int, int]]:
    """Ranges of elements, sorted and apart, that contain all ``extents``: exactly those if the ranges have ``lone`` elements or more."""
    runs = sorted(run for begin, sizes in extents if math.prod(sizes) for run in _runs(begin, sizes, shape, lone))
    joined: list[tuple[int, int]] = []
    for first, stop in runs:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined


def _runs(begin: Sequence[int], sizes: Sequence[int], shape: Sequence[int], lone: int) -> Iterator[tuple[int, int]]:
    """As `_runs_of`, for one box that is not empty.

    A box of several short runs is widened in its last dimensions, one short run to multiples of ``lone`` elements.
    """
    begin, sizes = list(begin), list(sizes)
    while True:
        dim = len(shape)  # all dimensions from this one on are whole
        while dim and sizes[dim - 1] == shape[dim - 1]:
            dim -= 1
        length = math.prod(sizes[max(dim - 1, 0) :])
        if dim == 0 or length >= lone or math.prod(sizes[: dim - 1]) == 1:
            break
        begin[dim - 1], sizes[dim - 1] = 0, shape[dim - 1]
    outer = [range(at, at + size) for at, size in zip(begin[: max(dim - 1, 0)], sizes)]
    inside = begin[dim - 1] * math.prod(shape[dim:]) if dim else 0
    for indices in product(*outer):
        first = _flat(indices, shape) + inside
        stop = first + length
        if length < lone:
            first, stop = first // lone * lone, min(-(-stop // lone) * lone, math.prod(shape))
        yield first, stop


def _flat(indices: Sequence[int], shape: Sequence[int]) -> int:
    """The number, in C order, of the first element below ``indices`` into the first dimensions."""
    return sum(index * math.prod(shape[dim + 1 :]) for dim, index in enumerate(indices))


def _needed(extents: Sequence[Extent], shape: Sequence[int], first: int, stop: int) -> int:
    """How many of the elements ``first`` to ``stop``, in C order, are in ``extents``, which do not overlap."""
    count = 0
    for box in boxes(shape, first, stop):
        rows = [(part.start, part.stop) for part in box] + [(0, size) for size in shape[len(box) :]]
        for begin, sizes in extents:
            count += math.prod(max(0, min(b, at + n) - max(a, at)) for (a, b), at, n in zip(rows, begin, sizes))
    return count
