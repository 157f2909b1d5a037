"""Saves: brings the boxes of all ranks to the ranks that own files, block by block, while the owners' engines write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardsave._saving.shards import PlannedShard

if TYPE_CHECKING:
    from shardsave._engine.transfer import Windows
    from shardsave._ranks.session import Session


class Shipping:
    """The exchange of one save. All ranks make it with equal ``shards`` and ``owners``: the rank that writes each shard.

    Pieces of ``shards`` are `Spread` tensors (or other sources, which the owner then holds itself). ``mine``: the numbers of the shards
    that this rank owns. ``own``: these shards, with pieces for this rank's engine. They must be written in this order, every one:
    ``ShardWriter(transaction, shipping.own, names, watch, windows=shipping, …)``; the writer asks `windows` for each of its groups.

    Use: make it (no I/O), `start`, write, `finish`; `close` in any case.
    Threads: it has threads of its own, on which local tensors are read; `start`, `finish` and `close` are for the thread that saves.
    """

    mine: list[int]
    own: list[PlannedShard]
    #: Bytes that left this rank for others, that came from others, and the most memory that it held for that (not the engine's ring).
    sent_bytes: int
    received_bytes: int
    peak_bytes: int

    def __init__(self, session: Session, shards: Sequence[PlannedShard], owners: Sequence[int]) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Connects to the other ranks; from now on local tensors are read. Every rank calls it, also one that owns nothing.

        Raises what `Session.check` raises, and ShardSaveError.
        """

    def windows(self, group: Sequence[PlannedShard]) -> Windows:
        """What the engine needs for a run that writes ``group``, the next shards of ``own``."""
        raise NotImplementedError

    def finish(self) -> None:
        """Waits until the other ranks have taken everything from this one: local tensors are then read no more.

        An owner calls it after its engine's last run. Calls `Session.check` all the time. Raises as `start`.
        """

    def close(self) -> None:
        """Ends threads and connections and frees the memory, after success and after any error. Never waits for other ranks."""
