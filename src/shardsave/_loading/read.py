"""Reads tensors of an open checkpoint into memory and verifies every byte that has a stored checksum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import numpy as np
import torch

from shardsave._common.boxes import box
from shardsave._common.derived_layouts import Region
from shardsave._common.gc_pause import gc_paused
from shardsave._common.progress import Progress
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._common.spread_views import viewed
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks
from shardsave._engine.totals import Totals
from shardsave._engine.transfer import BLOCK_BYTES, Piece, Transfer, TransferFault, Windows
from shardsave._format.dtypes import BY_NAME, item_bytes
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave.errors import CorruptCheckpointError, ShardSaveError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A stored tensor and what receives its bytes, a tensor or this rank's part of one; None: the bytes are only verified.
Target = tuple[Located, Union[torch.Tensor, Spread, None]]


class TensorReader:
    """Reads tensors of one open checkpoint, in one run or in several, and adds up the figures for the report.

    ``shards``: the files that were read. ``tensors``: how many were read; those with a wrong checksum do not count. ``damaged``: the
    tensors whose checksum is wrong, each with a message. ``verified``: whether every byte was verified; None: some tensors have no
    stored checksum.
    """

    def __init__(self, checkpoint: Checkpoint, *, verify: bool, progress: Progress) -> None:
        self.totals = Totals()
        self.shards: set[str] = set()
        self.tensors = 0
        self.damaged: list[tuple[Located, str]] = []
        self.verified: bool | None = verify
        self._checkpoint = checkpoint
        self._verify = verify
        self._progress = progress

    def read(self, targets: Sequence[Target]) -> None:
        """Fills ``targets``. Raises CorruptCheckpointError if checksums are wrong, once all targets have been read."""
        whole = len(targets)
        if any([located.chunks for located, _ in targets]):
            targets = [part for target in targets for part in _chunk_targets(target)]
        stored = [located for located, _ in targets]
        if self._verify and None in [located.checksum for located in stored]:
            self.verified = None
        shards = sorted({located.shard for located in stored})
        self.shards.update(shards)
        with gc_paused():
            extents = _extents(stored, shards)
            order = np.lexsort((extents[:, 1], extents[:, 0]))
            extents, targets = extents[order], [targets[n] for n in order.tolist()]
        step = self._checkpoint.allowance
        damaged: list[tuple[Located, str]] = []
        for first in range(0, len(shards), step):
            group = shards[first : first + step]
            begin, end = np.searchsorted(extents[:, 0], [first, first + step]).tolist()
            extents[begin:end, 0] -= first
            damaged += self._read_group(group, targets[begin:end], extents[begin:end])
            for shard in group:
                self._checkpoint.release(shard)
        self.tensors -= len(targets) - whole
        if damaged:
            self.damaged += damaged
            more = f"; {len(damaged) - 1} more tensors are damaged" if len(damaged) > 1 else ""
            raise CorruptCheckpointError(damaged[0][1] + more)

    def read_together(self, targets: Sequence[Target]) -> None:
        """As `read`, called once by each rank of a job; where there is only one, it is `read`."""
        self.read(targets)

    def is_of_job(self, error: Exception) -> bool:
        """Whether ``error`` is that of all ranks of a job, which all raise in the same words."""
        return False

    def _read_group(
        self, shards: Sequence[str], targets: Sequence[Target], extents: NDArray[np.int64]
    ) -> list[tuple[Located, str]]:
        """Reads ``targets``, all in ``shards``, which are open at the same time; returns the damaged tensors."""
        with gc_paused():
            dtypes = {dtype: BY_NAME[dtype].torch for dtype in {t.dtype for t, _ in targets}}
            pieces = [_piece(into, dtypes[t.dtype]) for t, into in targets]
            planned = blocks(extents, BLOCK_BYTES)
            checksums = [t.checksum for t, _ in targets]
        checksum = self._verify and checksums.count(None) < len(checksums)
        transfer = self._transfer(shards, planned, pieces, checksum=checksum)
        damaged = [
            (located, damage_message(located, computed))
            for (located, _), stored, computed in zip(targets, checksums, transfer.sums)
            if computed != stored and stored is not None
        ]
        self.tensors += len(pieces) - len(damaged)
        return damaged

    def _transfer(
        self, shards: Sequence[str], planned: Blocks, pieces: Sequence[Piece], *, checksum: bool, windows: Windows | None = None
    ) -> Transfer:
        """Runs the engine. File n of the blocks is ``shards[n]``."""
        files = self._checkpoint.descriptors(shards)
        try:
            transfer = engine.read(files, planned, pieces, checksum=checksum, windows=windows, tick=self._tick)
        except TransferFault as fault:
            path = self._checkpoint.path_of(shards[max(fault.file, 0)])
            raise ShardSaveError(f"cannot read {path}: {fault}; the files on disk are as they were") from fault
        moved = int(planned.piece_bytes.sum())
        self._progress.run_ended(moved)
        self.totals = self.totals.plus(transfer, moved)
        return transfer

    def _tick(self, done: int) -> None:
        self._progress.tick(done)


def _piece(into: torch.Tensor | Spread | None, dtype: torch.dtype) -> Piece:
    if isinstance(into, Spread):
        return into.cast(dtype)
    return TensorSource(into, dtype) if into is not None else None


def _chunk_targets(target: Target) -> list[Target]:
    """A target for each chunk of a stored tensor: a view of the tensor that receives it."""
    located, into = target
    if not located.chunks:
        return [target]
    if isinstance(into, Spread):
        return [(chunk, viewed(into, Region.box(begin, chunk.shape))) for begin, chunk in located.chunks]
    return [(chunk, None if into is None else into[box(begin, chunk.shape)]) for begin, chunk in located.chunks]


def damage_message(located: Located, computed: int) -> str:
    """Says that the bytes of a stored tensor have the checksum ``computed``, which is not the stored one."""
    return (
        f"corrupt shard {located.shard}: tensor {located.name!r} has checksum {computed:016x}, its header says "
        f"{located.checksum:016x}; the file was changed after it was saved"
    )


def _extents(stored: Sequence[Located], shards: Sequence[str]) -> NDArray[np.int64]:
    """The file and the byte range of each tensor, in the form that `blocks` takes; a file's number is its position in ``shards``."""
    number = {shard: position for position, shard in enumerate(shards)}
    grain = {dtype: item_bytes(dtype) for dtype in BY_NAME}
    extents = np.empty((len(stored), 4), dtype=np.int64)
    extents[:, 0] = [number[t.shard] for t in stored]
    extents[:, 1] = [t.offset for t in stored]
    extents[:, 2] = [t.nbytes for t in stored]
    extents[:, 3] = [grain[t.dtype] for t in stored]
    return extents
