"""Saves: brings the boxes of all ranks to the ranks that own files, block by block, while the owners' engines write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._common.layouts import Extent, Layout
from shardsave._common.spread import Spread, kinds_of
from shardsave._engine.transfer import InWindow
from shardsave._ranks.exchange import Exchange, RunWindows
from shardsave._ranks.shares import Run
from shardsave._ranks.traffic import Traffic
from shardsave._saving.shards import PlannedShard, plan_blocks

if TYPE_CHECKING:
    from shardsave._common.sources import ByteSource
    from shardsave._ranks.session import Session


class SaveExchange:
    """What ranks exchange in one save. All ranks make it with equal ``shards`` and ``owners``: the rank that writes each shard.

    Pieces of ``shards`` are `Spread` tensors (or other sources, which the owner then holds itself). ``mine``: the numbers of the shards
    that this rank owns. ``own``: these shards, with pieces for this rank's engine. They must be written in this order, every one:
    ``ShardWriter(transaction, shipping.own, names, watch, supply=shipping, …)``.

    Use: make it (no I/O), start its ``exchange``, write, finish the exchange; close that in any case. From start to finish, local tensors
    are read on threads of the exchange.
    """

    def __init__(self, session: Session, shards: Sequence[PlannedShard], owners: Sequence[int]) -> None:
        self._session = session
        self._shards: dict[int, list[PlannedShard]] = {}
        for shard, owner in zip(shards, owners):
            self._shards.setdefault(owner, []).append(shard)
        self.mine = [number for number, owner in enumerate(owners) if owner == session.rank]
        self._runs: dict[int, Run] = {}
        self._givers = Givers(session.hosts)
        self.own = self._for_engine()
        self._next = 0
        traffic = Traffic(session.rank, "in", self._run, self._givers.of)
        self._windowed = traffic.windowed()
        self.exchange = Exchange(session, sorted(self._shards), np.flatnonzero(self._windowed).tolist(), traffic)

    def windows(self, group: Sequence[PlannedShard]) -> RunWindows:
        """The windows of the engine's run that writes ``group``, the next shards of ``own``."""
        files = self._run(self._session.rank).blocks.table[:, 0]
        first, stop = np.searchsorted(files, [self._next, self._next + len(group)]).tolist()
        self._next += len(group)
        return RunWindows(self.exchange, np.arange(first, stop), self._windowed)

    def _run(self, owner: int) -> Run:
        """What ``owner`` writes. A tensor that it holds as a whole is not exchanged."""
        run = self._runs.get(owner)
        if run is None:
            shards = self._shards.get(owner, [])
            tensors = self._exchanged([piece for shard in shards for piece in shard.pieces], owner)
            run = self._runs[owner] = Run(plan_blocks(shards), tensors, [0] * len(tensors))
        return run

    def _exchanged(self, pieces: Sequence[ByteSource], owner: int) -> list[Spread | None]:
        """``pieces`` of ``owner``, with None for those that it holds as a whole."""
        kinds, first = kinds_of(pieces)
        shared = [isinstance(piece, Spread) and self._givers.of(piece, owner).keys() != {owner} for piece in first]
        return [piece if shared[kind] else None for piece, kind in zip(pieces, kinds)]  # type: ignore[misc]

    def _for_engine(self) -> list[PlannedShard]:
        """The shards of this rank with pieces for its engine: tensors of which it has only some boxes are filled in windows."""
        exchanged = iter(self._run(self._session.rank).tensors)
        shards = []
        for shard in self._shards.get(self._session.rank, ()):
            kinds, first = kinds_of(shard.pieces)
            in_window = [InWindow(piece.dtype, piece.shape, piece.nbytes) for piece in first]
            pairs = zip(shard.pieces, kinds, exchanged)
            shards.append(shard.with_pieces([piece if tensor is None else in_window[kind] for piece, kind, tensor in pairs]))
        return shards


class Givers:
    """Which ranks give which boxes of a tensor to an owner; ``hosts``: the number of each rank's host."""

    def __init__(self, hosts: Sequence[int]) -> None:
        self._hosts = hosts
        self._once: dict[Layout, Mapping[int, Sequence[Extent]] | None] = {}
        self._by_owner: dict[tuple[Layout, int], Mapping[int, Sequence[Extent]]] = {}

    def of(self, tensor: Spread, owner: int) -> Mapping[int, Sequence[Extent]]:
        layout = tensor.layout
        if layout not in self._once:
            self._once[layout] = _without_replicas(layout)
        once = self._once[layout]
        if once is not None:
            return once
        key = layout, owner
        if key not in self._by_owner:
            boxes: dict[int, list[Extent]] = {}
            for rank, box in tensor.senders(owner, self._hosts):
                boxes.setdefault(rank, []).append(box)
            self._by_owner[key] = boxes
        return self._by_owner[key]


def _without_replicas(layout: Layout) -> Mapping[int, Sequence[Extent]] | None:
    """The boxes of all ranks, if no two of them overlap: then each gives what it has, whoever the owner is. None if some do."""
    boxes = {rank: held for rank in layout.ranks if (held := layout.boxes(rank))}
    elements = sum(math.prod(sizes) for held in boxes.values() for _, sizes in held)
    return boxes if elements == math.prod(layout.shape) else None
