"""Which rank reads which bytes, so that each byte that somebody needs is read once in the whole job; computed by every rank for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from shardsave._format.dtypes import BY_NAME
from shardsave._ranks.division import CommonRange, Division, divide
from shardsave._ranks.read_requests import Key, ReadRequest

#: One rank reads neighbouring ranges of a file, up to this many bytes together, so that small tensors share reads.
RUN_BYTES = 4 << 20

#: Ranges of a file with a gap of fewer bytes are neighbours.
_GAP_BYTES = 4096

#: The reader of a range is the one with the fewest bytes so far among at most this many of the ranks that need it.
_CANDIDATES = 32


class Range(NamedTuple):
    """Bytes ``begin`` to ``end`` of stored tensor ``number``, which counts the wanted ones in the order of files and offsets."""

    number: int
    begin: int
    end: int


class ReadPlan(NamedTuple):
    """``alone``: what this rank reads for itself. ``unneeded``: what it reads for the checksum only. ``common``: for each rank, what it
    reads for several ranks."""

    alone: list[Range]
    unneeded: list[Range]
    common: list[list[Range]]


def plan_reads(wants: Mapping[Key, ReadRequest], rank: int, size: int, *, every_byte: bool) -> ReadPlan:
    """The plan for ``wants``, in the order of files and offsets. ``every_byte``: read also what nobody needs."""
    divisions = _divisions(wants)
    readers = _Readers(size)
    times = Counter(map(id, divisions))
    for division in {id(division): division for division in divisions}.values():
        for reader, ranges in division.alone.items():
            readers.loads[reader] += times[id(division)] * sum(end - begin for begin, end in ranges)
    plan = ReadPlan([], [], [[] for _ in range(size)])
    for number, (((shard, offset), want), division) in enumerate(zip(wants.items(), divisions)):
        plan.alone.extend(Range(number, begin, end) for begin, end in division.alone.get(rank, ()))
        for common in division.common:
            one = Range(number, common.begin, common.end)
            if common.needs:
                reader = readers.choose(shard, offset, common)
                if len(common.needs) > 1:
                    plan.common[reader].append(one)
                elif reader == rank:
                    plan.alone.append(one)
            elif every_byte and want.layout.ranks and want.layout.ranks[number % len(want.layout.ranks)] == rank:
                plan.unneeded.append(one)
    return plan


def _divisions(wants: Mapping[Key, ReadRequest]) -> list[Division]:
    """The division of each of ``wants``; layouts are hashed slowly, and most tensors share theirs."""
    items = {dtype: BY_NAME[dtype].torch.itemsize for dtype in {want.dtype for want in wants.values()}}
    known: dict[tuple[int, str], Division] = {}
    divisions = []
    for dtype, layout in wants.values():
        division = known.get((id(layout), dtype))
        if division is None:
            division = known[id(layout), dtype] = divide(layout, items[dtype])
        divisions.append(division)
    return divisions


class _Readers:
    """Chooses the readers of ranges, one after the other. ``loads``: how many bytes each rank reads so far."""

    def __init__(self, size: int) -> None:
        self.loads = [0] * size
        self._last = (0, "", 0, 0)  # reader, file, end there, bytes of the run
        self._turn = 0

    def choose(self, shard: str, offset: int, one: CommonRange) -> int:
        """The rank that reads ``one``, of a tensor that begins at ``offset``; one of those that need something of it."""
        begin, nbytes = offset + one.begin, one.end - one.begin
        reader, last_shard, last_end, run = self._last
        is_next = shard == last_shard and 0 <= begin - last_end < _GAP_BYTES
        if not (is_next and run + nbytes <= RUN_BYTES and reader in one.needs):
            candidates, run = [*one.needs], 0
            if len(candidates) > _CANDIDATES:
                self._turn += 1
                first = self._turn * _CANDIDATES % len(candidates)
                candidates = candidates[first : first + _CANDIDATES]
            reader = min(candidates, key=self.loads.__getitem__)
        self._last = (reader, shard, begin + nbytes, run + nbytes)
        self.loads[reader] += nbytes
        return reader
