"""Compares tensors, and files, as they are now with the checksums that an earlier checkpoint has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from shardsave._common.sources import ByteSource
from shardsave._engine import engine
from shardsave._format.packing import StoredTensor, pack
from shardsave._saving.frozen import FrozenMemory, sum_when_saved
from shardsave._saving.read_back import damage_on_disk
from shardsave._saving.shards import UnchangedShard, data_blocks
from shardsave._saving.watch import Watch
from shardsave._storage.earlier import EarlierCheckpoint


class Stored(NamedTuple):
    """A tensor that was stored with the ``checksum``, and what would be written of it now."""

    checksum: int
    tensor: StoredTensor
    piece: ByteSource


class Comparison(Protocol):
    """What tells which tensors have changed."""

    def known(self, stored: Stored) -> int | None:
        """The checksum of what would be written, if that needs no pass over its memory."""

    def equal(self, lists: Sequence[Sequence[Stored]]) -> list[bool]:
        """For each list, whether all tensors in it have their stored checksums now. Raises TransferFault."""

    def damage_on_disk(self, earlier: EarlierCheckpoint, shards: Sequence[UnchangedShard]) -> list[str]:
        """For each of ``shards``, why its file cannot be taken over; "" if the disk has what its header says."""


class InThisProcess:
    """The comparison of a process that has all tensors. ``frozen``: name → memory that may be assumed to be unchanged."""

    def __init__(self, frozen: Mapping[str, FrozenMemory], watch: Watch) -> None:
        self._frozen = frozen
        self._watch = watch

    def known(self, stored: Stored) -> int | None:
        known: int | None = getattr(stored.piece, "crc", None)  # a copy in memory was summed when it was made
        if known is None and stored.tensor.name in self._frozen:
            known = sum_when_saved(self._frozen[stored.tensor.name])
        return known if stored.tensor.nbytes else 0

    def equal(self, lists: Sequence[Sequence[Stored]]) -> list[bool]:
        sums = self._sums([stored for row in lists for stored in row])
        return [all(sums[tensor.name] == checksum for checksum, tensor, _ in row) for row in lists]

    def damage_on_disk(self, earlier: EarlierCheckpoint, shards: Sequence[UnchangedShard]) -> list[str]:
        return [damage_on_disk(earlier, shard, self._watch.check) for shard in shards]

    def _sums(self, stored: Sequence[Stored]) -> dict[str, int]:
        """The checksum of each tensor as it is in memory now, by name."""
        (layout,) = pack([tensor for _, tensor, _ in stored], None)  # in an order in which no element is cut
        pieces = {tensor.name: piece for _, tensor, piece in stored}
        names = [tensor.name for tensor in layout.tensors]
        transfer = engine.gather(
            data_blocks([(layout, 0)]),
            [pieces[name] for name in names],
            workers=self._watch.workers,
            tick=lambda done: self._watch.check(),
        )
        return dict(zip(names, transfer.sums))
