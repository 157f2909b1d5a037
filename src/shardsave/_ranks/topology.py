"""Which ranks are on which host. Everybody knows it as soon as a session has begun."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Topology:
    """``hosts``: the number of each rank's host. ``host_names``: what the machines are called. ``names``: the global rank of each rank."""

    hosts: tuple[int, ...]
    host_names: tuple[str, ...]
    names: tuple[int, ...]

    def ranks_of(self, host: int) -> Sequence[int]:
        return self._ranks_of_hosts[host]

    def leaders(self) -> list[int]:
        """The lowest rank of each host, in order of hosts."""
        return [ranks[0] for ranks in self._ranks_of_hosts]

    @cached_property
    def _ranks_of_hosts(self) -> Sequence[Sequence[int]]:
        """The ranks of each host, found once: of ten thousand ranks, all are asked for again and again."""
        found: list[list[int]] = [[] for _ in self.host_names]
        for rank, host in enumerate(self.hosts):
            found[host].append(rank)
        return found

    def name(self, rank: int) -> str:
        """``rank 3``, and its machine where there are several."""
        machine = f" ({self.host_names[self.hosts[rank]]})" if len(set(self.host_names)) > 1 else ""
        return f"rank {self.names[rank]}{machine}"

    def packed(self) -> bytes:
        return zlib.compress(json.dumps([self.hosts, self.host_names]).encode(), 1)


def unpack_topology(packed: bytes, names: tuple[int, ...]) -> Topology:
    hosts, host_names = json.loads(zlib.decompress(packed))
    return Topology(tuple(hosts), tuple(host_names), names)


def runs_of(ranks: Iterable[int]) -> list[list[int]]:
    """The first and the last rank of each run of ``ranks``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return runs


def listed(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 1, 4 to 7``. Long lists are cut."""
    words = [
        str(first) if first == last else f"{first}{' to ' if last > first + 1 else ', '}{last}"
        for first, last in runs_of(ranks)
    ]
    if len(words) > 20:
        words[20:] = ["…"]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
