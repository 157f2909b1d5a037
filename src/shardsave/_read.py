"""Bringing tensors of an open checkpoint into memory, every byte checked where the file has checksums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from shardsave import _engine
from shardsave._checkpoint import Checkpoint, Located
from shardsave._collector import collector_still
from shardsave._dtypes import BY_NAME, item_bytes
from shardsave._plan import Extent, blocks
from shardsave._progress import Progress
from shardsave.errors import CorruptCheckpointError, ShardSaveError


class Target(NamedTuple):
    """A stored tensor and where its bytes go; without a tensor they are only checked."""

    located: Located
    tensor: torch.Tensor | None


@dataclass
class ReadTotals:
    """What the runs of one verb add up to. ``tensors``: those found to be what was saved, as far as that was checked.

    ``damaged``: those that are not, and what is wrong with each.
    """

    bytes: int = 0
    tensors: int = 0
    direct: bool = True
    staging_bytes: int = 0
    pinned: bool = False
    verified: bool | None = True
    notes: tuple[str, ...] = ()
    damaged: list[tuple[Located, str]] = field(default_factory=list)


def read_tensors(
    checkpoint: Checkpoint, targets: Sequence[Target], *, verify: bool, progress: Progress, totals: ReadTotals
) -> None:
    """Fills ``targets``, adding to ``totals`` what was done.

    Raises CorruptCheckpointError naming every tensor whose checksum is wrong, after all have been read.
    """
    if not verify:
        totals.verified = False
    elif any(located.checksum is None for located, _ in targets):
        totals.verified = None
    with collector_still():
        order = sorted(targets, key=lambda target: (target[0].shard, target[0].offset))
    shards = list(dict.fromkeys(located.shard for located, _ in order))
    step = checkpoint.allowance
    damaged: list[tuple[Located, str]] = []
    for first in range(0, len(shards), step):
        group = shards[first : first + step]
        chosen = [target for target in order if target.located.shard in set(group)] if len(shards) > step else order
        damaged += _read_group(checkpoint, group, chosen, verify, progress, totals)
        for shard in group:
            checkpoint.release(shard)
    if damaged:
        totals.damaged += damaged
        more = f"; {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
        raise CorruptCheckpointError(damaged[0][1] + more)


def _read_group(
    checkpoint: Checkpoint,
    shards: Sequence[str],
    targets: Sequence[Target],
    verify: bool,
    progress: Progress,
    totals: ReadTotals,
) -> list[tuple[Located, str]]:
    number = {shard: place for place, shard in enumerate(shards)}
    with collector_still():
        dtypes = {dtype: (BY_NAME[dtype].torch, item_bytes(dtype)) for dtype in {t.dtype for t, _ in targets}}
        extents = [Extent(number[t.shard], t.offset, t.nbytes, at, dtypes[t.dtype][1]) for at, (t, _) in enumerate(targets)]
        pieces = [_engine.Piece(tensor, dtypes[t.dtype][0], t.nbytes) for t, tensor in targets]
        planned = blocks(extents, _engine.BLOCK_BYTES)
    checksum = verify and any(target.located.checksum is not None for target in targets)
    files = checkpoint.descriptors(shards)
    try:
        done = _engine.read(files, planned, pieces, checksum=checksum, tick=progress.tick)
    except _engine.TransferFault as fault:
        path = checkpoint.path_of(shards[max(fault.file, 0)])
        raise ShardSaveError(f"cannot read {path}: {fault}; the files on disk are as they were") from fault
    moved = sum(piece.nbytes for piece in pieces)
    progress.run_ended(moved)
    totals.bytes += moved
    totals.direct &= all(done.direct)
    totals.staging_bytes = max(totals.staging_bytes, done.staging_bytes)
    totals.pinned |= done.pinned
    totals.notes = tuple(dict.fromkeys([*totals.notes, *done.notes]))
    damaged = [
        (
            t,
            f"corrupt shard {t.shard}: tensor {t.name!r} has checksum {found:016x}, its header says {t.checksum:016x}; "
            f"the file was changed after it was saved",
        )
        for (t, _), found in zip(targets, done.sums)
        if t.checksum is not None and found != t.checksum
    ]
    totals.tensors += len(pieces) - len(damaged)
    return damaged
