"""Reads shards of an earlier checkpoint back: whether the disk still has what their headers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shardsave._common.os_calls import CallFailed
from shardsave._engine import engine
from shardsave._engine.transfer import TransferFault
from shardsave._format.packing import Shard
from shardsave._saving.shards import UnchangedShard, data_blocks
from shardsave._storage.earlier import EarlierCheckpoint


def sums_on_disk(file: int, layout: Shard, data_start: int, check: Callable[[], object]) -> Sequence[int]:
    """The checksums that the tensors of ``layout`` have in the open ``file``; ``data_start``: where its data begins. Its pages in the
    cache are not believed. ``check`` is called again and again.

    Raises TransferFault, and what ``check`` raises.
    """
    pieces = [None] * len(layout.tensors)
    blocks = data_blocks([(layout, data_start)])
    return engine.read([file], blocks, pieces, access="direct", tick=lambda done: check()).sums


def damage_on_disk(earlier: EarlierCheckpoint, shard: UnchangedShard, check: Callable[[], object]) -> str:
    """Why the file of ``shard`` cannot be taken over; "" if the disk has what its header says. Raises what ``check`` raises."""
    name = shard.earlier.name
    try:
        file = earlier.open(name, shard.earlier.identity)
        if file is None:
            return f"{name} of {earlier.path} was removed or replaced meanwhile, it was written anew"
        with file:
            sums = sums_on_disk(file.fd, shard.planned.layout, shard.earlier.record.header_length, check)
    except (CallFailed, TransferFault) as error:
        return f"{name} of {earlier.path} cannot be read ({error}), it was written anew"
    return damage_of(earlier, shard, sums)


def damage_of(earlier: EarlierCheckpoint, shard: UnchangedShard, sums: Sequence[int]) -> str:
    """What is damaged of ``shard``, whose tensors have the checksums ``sums`` on the disk; "" if nothing is."""
    for tensor, stored, computed in zip(shard.planned.layout.tensors, shard.sums, sums):
        if stored != computed:
            return (
                f"{shard.earlier.name} of {earlier.path} is damaged, it was written anew: tensor {tensor.name!r} has checksum "
                f"{computed:016x}, its header says {stored:016x}; the file was changed after it was saved"
            )
    return ""
