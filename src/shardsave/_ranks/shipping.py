"""Saves: brings the boxes of all ranks to the ranks that own files, block by block, while the owners' engines write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._common.layouts import Extent, Layout
from shardsave._common.spread import Spread
from shardsave._engine.transfer import InWindow
from shardsave._ranks.copies import Local
from shardsave._ranks.exchange import Exchange
from shardsave._ranks.parts import Parts, Run
from shardsave._saving.shards import PlannedShard, plan_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.session import Session


class Shipping:
    """The exchange of one save. All ranks make it with equal ``shards`` and ``owners``: the rank that writes each shard.

    Pieces of ``shards`` are `Spread` tensors (or other sources, which the owner then holds itself). ``mine``: the numbers of the shards
    that this rank owns. ``own``: these shards, with pieces for this rank's engine. They must be written in this order, every one:
    ``ShardWriter(transaction, shipping.own, names, watch, supply=shipping, …)``.

    Use: make it (no I/O), `start`, write, `finish`; `close` in any case.
    Threads: it has threads of its own, on which local tensors are read; `start`, `finish` and `close` are for the thread that saves.
    """

    def __init__(self, session: Session, shards: Sequence[PlannedShard], owners: Sequence[int]) -> None:
        self._session = session
        self._shards: dict[int, list[PlannedShard]] = {}
        for shard, owner in zip(shards, owners):
            self._shards.setdefault(owner, []).append(shard)
        self.mine = [number for number, owner in enumerate(owners) if owner == session.rank]
        self.own = [_for_engine(shards[number]) for number in self.mine]
        self._runs: dict[int, Run] = {}
        self._givers = Givers(session.hosts)
        self._parts = Parts(self._run, self._givers.of)
        self._local = Local("in")
        self._windowed = self._find_windowed()
        self._next = 0
        numbers = np.flatnonzero(self._windowed).tolist()
        self._exchange = Exchange(session, sorted(self._shards), numbers, self._taking, self._fill, "in")

    @property
    def sent_bytes(self) -> int:
        """The bytes that left this rank for others."""
        return self._exchange.sent_bytes

    @property
    def received_bytes(self) -> int:
        """The bytes that came from other ranks."""
        return self._exchange.received_bytes

    @property
    def peak_bytes(self) -> int:
        """The most memory that this rank had for that, beside the engine's ring."""
        return self._exchange.peak_bytes

    def start(self) -> None:
        """Connects to the other ranks; from now on local tensors are read. Every rank calls it, also one that owns nothing.

        Raises what `Session.check` raises, and ShardSaveError.
        """
        self._exchange.start()

    def windows(self, group: Sequence[PlannedShard]) -> _Windows:
        """The windows of the engine's run that writes ``group``, the next shards of ``own``."""
        count = len(plan_blocks(group).table)
        first, self._next = self._next, self._next + count
        return _Windows(self._exchange, first, self._windowed[first : first + count])

    def finish(self) -> None:
        """Waits until the other ranks have taken everything from this one: local tensors are then read no more.

        An owner calls it after its engine's last run. Calls `Session.check` all the time. Raises as `start`.
        """
        self._exchange.finish()

    def close(self) -> None:
        """Ends threads and connections and frees the memory, after success and after any error. Never waits for other ranks."""
        self._exchange.close()

    def _run(self, owner: int) -> Run:
        run = self._runs.get(owner)
        if run is None:
            shards = self._shards.get(owner, [])
            pieces = [piece if isinstance(piece, Spread) else None for shard in shards for piece in shard.pieces]
            run = self._runs[owner] = Run(plan_blocks(shards), pieces, [0] * len(pieces))
        return run

    def _find_windowed(self) -> NDArray[np.bool_]:
        """For each block of this rank, whether it has bytes of a tensor that other ranks hold too."""
        pieces = [piece for shard in self.own for piece in shard.pieces]
        table, segments, _ = self._run(self._session.rank).blocks
        in_window = np.array([isinstance(piece, InWindow) for piece in pieces], dtype=bool)
        if not len(table):
            return np.zeros(0, dtype=bool)
        return np.logical_or.reduceat(in_window[segments[:, 0]], table[:, 3])

    def _taking(self, block: int) -> dict[int, int]:
        taking = self._parts.taking(self._session.rank, block)
        taking.pop(self._session.rank, None)
        return taking

    def _fill(self, owner: int, block: int, address: int) -> int:
        parts = self._parts.of(owner, block, self._session.rank)
        if owner == self._session.rank:  # the engine takes those from where they are
            parts = (part for part in parts if not part.tensor.is_whole)
        return self._local.copy(parts, address)


class _Windows:
    """Those of one run of the owner's engine, whose first block is number ``first`` of the owner's."""

    def __init__(self, exchange: Exchange, first: int, of_block: NDArray[np.bool_]) -> None:
        self.of_block = of_block
        self._exchange = exchange
        self._first = first

    def take(self, block: int) -> memoryview | None:
        return self._exchange.take(self._first + block)

    def give_back(self, block: int) -> None:
        self._exchange.give_back(self._first + block)


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


def _for_engine(shard: PlannedShard) -> PlannedShard:
    """``shard`` with pieces for its owner's engine: a tensor of which it holds only a part is filled in windows."""
    kinds: dict[Layout, bool] = {}
    new = {}
    for piece in shard.pieces:
        if isinstance(piece, Spread):
            whole = kinds.get(piece.layout)
            if whole is None:
                whole = kinds[piece.layout] = piece.is_whole
            if not whole:
                new[id(piece)] = InWindow(piece.dtype, piece.shape, piece.nbytes)
    return shard.with_sources(new)
