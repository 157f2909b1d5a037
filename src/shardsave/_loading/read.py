"""Bringing tensors of an open checkpoint into memory, every byte checked where the file has checksums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Union

import numpy as np
import torch

from shardsave._common.gc_pause import collector_still
from shardsave._common.progress import Progress
from shardsave._common.sources import TensorSource
from shardsave._engine import engine
from shardsave._engine.blocks import blocks
from shardsave._engine.transfer import BLOCK_BYTES, TransferFault
from shardsave._format.dtypes import BY_NAME, item_bytes
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave.errors import CorruptCheckpointError, ShardSaveError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A stored tensor and where its bytes go; without a tensor they are only checked.
Target = tuple[Located, Union[torch.Tensor, None]]


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
    elif None in [located.checksum for located, _ in targets]:
        totals.verified = None
    shards = sorted({located.shard for located, _ in targets})
    with collector_still():
        extents = _extents(targets, shards)
        order = np.lexsort((extents[:, 1], extents[:, 0]))
        extents, targets = extents[order], [targets[n] for n in order.tolist()]
    step = checkpoint.allowance
    damaged: list[tuple[Located, str]] = []
    for first in range(0, len(shards), step):
        group = shards[first : first + step]
        begin, end = np.searchsorted(extents[:, 0], [first, first + step]).tolist()
        extents[begin:end, 0] -= first
        damaged += _read_group(checkpoint, group, targets[begin:end], extents[begin:end], verify, progress, totals)
        for shard in group:
            checkpoint.release(shard)
    if damaged:
        totals.damaged += damaged
        more = f"; {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
        raise CorruptCheckpointError(damaged[0][1] + more)


def _extents(targets: Sequence[Target], shards: Sequence[str]) -> NDArray[np.int64]:
    """Where the bytes of each target lie, as `blocks` wants it; files are numbered as ``shards`` are."""
    number = {shard: place for place, shard in enumerate(shards)}
    grain = {dtype: item_bytes(dtype) for dtype in BY_NAME}
    rows = ((number[t.shard], t.offset, t.nbytes, grain[t.dtype]) for t, _ in targets)
    return np.fromiter(chain.from_iterable(rows), np.int64, 4 * len(targets)).reshape(-1, 4)


def _read_group(
    checkpoint: Checkpoint,
    shards: Sequence[str],
    targets: Sequence[Target],
    extents: NDArray[np.int64],
    verify: bool,
    progress: Progress,
    totals: ReadTotals,
) -> list[tuple[Located, str]]:
    with collector_still():
        dtypes = {dtype: BY_NAME[dtype].torch for dtype in {t.dtype for t, _ in targets}}
        pieces = [TensorSource(tensor, dtypes[t.dtype]) if tensor is not None else None for t, tensor in targets]
        planned = blocks(extents, BLOCK_BYTES)
        checksums = [t.checksum for t, _ in targets]
    checksum = verify and checksums.count(None) < len(checksums)
    files = checkpoint.descriptors(shards)
    try:
        done = engine.read(files, planned, pieces, checksum=checksum, tick=progress.tick)
    except TransferFault as fault:
        path = checkpoint.path_of(shards[max(fault.file, 0)])
        raise ShardSaveError(f"cannot read {path}: {fault}; the files on disk are as they were") from fault
    moved = int(extents[:, 2].sum())
    progress.run_ended(moved)
    totals.bytes += moved
    totals.direct &= all(done.direct)
    totals.staging_bytes = max(totals.staging_bytes, done.staging_bytes)
    totals.pinned |= done.pinned
    totals.notes = tuple(dict.fromkeys([*totals.notes, *done.notes]))
    damaged = [
        (
            t := targets[n][0],
            f"corrupt shard {t.shard}: tensor {t.name!r} has checksum {found:016x}, its header says {wanted:016x}; "
            f"the file was changed after it was saved",
        )
        for n, (wanted, found) in enumerate(zip(checksums, done.sums))
        if found != wanted and wanted is not None
    ]
    totals.tensors += len(pieces) - len(damaged)
    return damaged
