"""The shards of a save: planned from the entries to store, then written and sealed in groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from shardsave._common.os_calls import CallFailed, descriptor_allowance
from shardsave._common.progress import Progress
from shardsave._common.sources import ByteSource
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks
from shardsave._engine.totals import Totals
from shardsave._engine.transfer import BLOCK_BYTES, Transfer, TransferFault, Windows
from shardsave._format.crc64 import crc64, joined
from shardsave._format.dtypes import BY_TORCH, logical_shape
from shardsave._format.header import encode_header, with_sums
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._format.packing import ALIGNMENT, Shard, StoredTensor, pack
from shardsave._saving.watch import Watch
from shardsave._state.module import Entry
from shardsave._storage.earlier import EarlierShard
from shardsave._storage.staging import StagedShard
from shardsave.errors import ShardSaveError

#: The most shards that are open at one time.
_MAX_OPEN_SHARDS = 256


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """A shard before it is written: its layout, and the memory of its tensors in file order. ``more``: additional items of the
    ``__metadata__`` in its header. ``owner``: the rank that must write it; None if any rank may."""

    layout: Shard
    pieces: list[ByteSource]
    more: Mapping[str, str] | None = None
    owner: int | None = None

    @cached_property
    def header(self) -> bytes:
        """Its header without checksums. It is encoded at the first use, since the call of a save in the background needs none."""
        return encode_header(self.layout, self.more)

    @property
    def names(self) -> list[str]:
        """The names of its tensors, in file order."""
        return [tensor.name for tensor in self.layout.tensors]

    @property
    def reserved_bytes(self) -> int:
        """The bytes to reserve on disk. Only whole blocks are written, so the last may reach past the end of the file."""
        return len(self.header) + -(-self.layout.data_bytes // ALIGNMENT) * ALIGNMENT

    def with_sources(self, new: Mapping[int, ByteSource]) -> PlannedShard:
        """The same shard with other sources of the same bytes: `id` of a source → what takes its place."""
        return replace(self, pieces=[new.get(id(piece), piece) for piece in self.pieces])


class Supply(Protocol):
    """Brings the bytes of pieces that other processes hold."""

    def windows(self, group: Sequence[PlannedShard]) -> Windows:
        """The windows of the engine's run that writes ``group``."""


class UnchangedShard(NamedTuple):
    """A shard that need not be written: as it is planned, the checksums of its tensors, and the file that has them."""

    planned: PlannedShard
    sums: tuple[int, ...]
    earlier: EarlierShard


def plan_shards(
    entries: Sequence[Entry], bound: int | None, *, apart: bool = True, more: Mapping[str, str] | None = None
) -> list[PlannedShard]:
    """Packs ``entries`` into shards of at most ``bound`` bytes of data, or into one shard if it is None.

    ``apart``: no shard holds both frozen and trainable entries. ``more``: additional items of the headers' ``__metadata__``.
    Raises ValueError for a header that is too long.
    """
    tensors, pieces = [], {}
    kinds: dict[tuple[torch.dtype, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}  # many tensors are of few kinds
    for name, _, frozen, _, source in entries:
        kind = source.dtype, source.shape
        if (known := kinds.get(kind)) is None:
            known = kinds[kind] = BY_TORCH[source.dtype].name, logical_shape(*kind), source.nbytes
        dtype, shape, nbytes = known
        tensors.append(StoredTensor(name, dtype, shape, nbytes, apart and bool(frozen)))
        pieces[name] = source
    layouts = pack(tensors, bound)
    shards = [PlannedShard(layout, [pieces[tensor.name] for tensor in layout.tensors], more) for layout in layouts]
    if bound is None or more:  # else `pack` has kept all headers short
        for shard in shards:
            _ = shard.header
    return shards


def repack(
    shards: Sequence[PlannedShard],
    kept: Sequence[PlannedShard],
    bound: int,
    place: Callable[[str], int],
    more: Mapping[str, str] | None,
) -> list[PlannedShard]:
    """The shards ``kept``, and the tensors of ``shards`` that they do not hold, packed again in the order of ``place`` in the state."""
    stored = [pair for shard in shards for pair in zip(shard.layout.tensors, shard.pieces)]
    stored.sort(key=lambda pair: place(pair[0].name))
    pieces = {tensor.name: piece for tensor, piece in stored}
    layouts = pack([tensor for tensor, _ in stored], bound, [shard.layout for shard in kept])
    new = [PlannedShard(layout, [pieces[tensor.name] for tensor in layout.tensors], more) for layout in layouts[len(kept) :]]
    return [*kept, *new]


def plan_blocks(shards: Sequence[PlannedShard]) -> Blocks:
    """Cuts the files of ``shards`` into the engine's blocks; the number of a block's file is the position of its shard."""
    return data_blocks([(shard.layout, len(shard.header)) for shard in shards])


def data_blocks(layouts: Sequence[tuple[Shard, int]]) -> Blocks:
    """The same for layouts, each with the offset in bytes at which its data begins."""
    extents = [np.empty((0, 4), dtype=np.int64)]
    for file, (layout, data_start) in enumerate(layouts):
        # Blocks are cut at multiples of the largest element size, so no element is cut: a grain of one byte is enough.
        rows = np.ones((len(layout.tensors), 4), dtype=np.int64)
        rows[:, 0] = file
        rows[:, 1] = np.array(layout.begins, dtype=np.int64) + data_start
        rows[:, 2] = [tensor.nbytes for tensor in layout.tensors]
        extents.append(rows)
    return blocks(np.concatenate(extents), BLOCK_BYTES)


class ShardFiles(Protocol):
    """Where shards are created: a transaction, or the staging directory of one that another process leads."""

    def create(self, name: str, length: int) -> StagedShard:
        """Creates the staged file of shard ``name`` with room for ``length`` bytes, reserved on disk if the file system supports that."""

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Finishes a shard whose data is written: sets its true length, writes its header."""

    def sync_sealed(self) -> None:
        """Syncs and closes the shards that are sealed."""

    def failure(self, error: CallFailed, needed: int | None = None) -> ShardSaveError:
        """The error for a call that failed before the commit. ``needed``: the bytes that all shards need, if the call was about that."""


def fault_before_writing(files: ShardFiles, fault: TransferFault) -> ShardSaveError:
    """The error for a fault of memory or of a device, before any file was written."""
    reason = fault.detail or f"{os.strerror(fault.errno)} (needs {fault.length} bytes)"
    return files.failure(CallFailed(fault.call, "", fault.errno, reason))


class ShardWriter:
    """Writes shards in groups that the descriptor limit allows, and collects what the index and the report need. ``shards``: by name.

    ``records``: file name → what the index records of a shard. ``file_records``: the same with checksums of whole files, which are
    computed only with ``whole_sums``. ``supply``: brings what other processes hold; shards are then written in the order given.
    """

    def __init__(
        self,
        files: ShardFiles,
        shards: Mapping[str, PlannedShard],
        watch: Watch,
        *,
        durable: bool,
        whole_sums: bool,
        supply: Supply | None = None,
    ) -> None:
        self.records: dict[str, ShardRecord] = {}
        self.file_records: dict[str, FileRecord] = {}
        self._sums: list[tuple[Shard, Sequence[int]]] = []
        self.sync_seconds = 0.0
        self.totals = Totals()
        self._files = files
        self._names = [*shards]
        self._shards = [*shards.values()]
        self._watch = watch
        self._durable = durable
        self._whole_sums = whole_sums
        self._supply = supply

    def reserve(self) -> None:
        """Allocates the memory that the engine will need, before anything is written."""
        try:
            engine.reserve([piece for shard in self._shards for piece in shard.pieces])
        except TransferFault as fault:
            raise fault_before_writing(self._files, fault) from fault

    def add_taken(self, taken: Mapping[str, UnchangedShard], progress: Progress) -> None:
        """Adds shards that are staged already, as if they had been written."""
        for name, shard in taken.items():
            layout, record = shard.planned.layout, shard.earlier.record
            self._add(name, with_sums(shard.planned.header, shard.sums), layout, shard.sums)
            assert self.records[name] == record
            progress.run_ended(layout.data_bytes)

    def sums_of(self, names: Container[str]) -> dict[str, int]:
        """The checksums of all tensors called so, by name."""
        pairs = (pair for layout, sums in self._sums for pair in zip(layout.tensors, sums))
        return {tensor.name: checksum for tensor, checksum in pairs if tensor.name in names}

    def write(self, progress: Progress) -> None:
        """Writes and seals all shards: each is then complete, synced and closed under its staged name."""
        step = min(descriptor_allowance(), _MAX_OPEN_SHARDS)
        urgent = [self._supply is None and self._watch.is_urgent(shard.pieces) for shard in self._shards]
        order = sorted(range(len(self._shards)), key=lambda number: not urgent[number])
        for first in range(0, len(order), step):
            group = order[first : first + step]
            self._write_group([self._shards[n] for n in group], [self._names[n] for n in group], progress)
        self.records.update({name: self.records.pop(name) for name in self._names})  # the index has them in the planned order

    def write_apart(self, shards: Mapping[str, PlannedShard], documents: Mapping[str, bytes], progress: Progress) -> None:
        """Writes more shards, of which this process has all bytes itself, and files with ``documents``; nothing else after that."""
        if shards:
            self._names, self._shards, self._supply = [*shards], [*shards.values()], None
            self.write(progress)
        for name, document in documents.items():
            self._files.seal(self._files.create(name, len(document)), len(document), document)
            self.records[name] = ShardRecord(len(document), len(document), crc64(document))
        self._files.sync_sealed()

    def _write_group(self, group: Sequence[PlannedShard], names: Sequence[str], progress: Progress) -> None:
        staged = [self._files.create(name, shard.reserved_bytes) for name, shard in zip(names, group)]
        transfer = self._transfer(staged, group, progress)
        group_bytes = sum(shard.layout.data_bytes for shard in group)
        self.totals = self.totals.plus(transfer, group_bytes)
        progress.run_ended(group_bytes)
        started = time.perf_counter()
        sums = iter(transfer.sums)
        for file, shard in zip(staged, group):
            self._seal(file, shard, list(islice(sums, len(shard.pieces))))
        self._files.sync_sealed()
        self.sync_seconds += time.perf_counter() - started

    def _seal(self, file: StagedShard, shard: PlannedShard, sums: Sequence[int]) -> None:
        header = with_sums(shard.header, sums)
        self._files.seal(file, len(header) + shard.layout.data_bytes, header)
        self._add(file.name, header, shard.layout, sums)

    def _add(self, name: str, header: bytes, layout: Shard, sums: Sequence[int]) -> None:
        length = len(header) + layout.data_bytes
        self.records[name] = ShardRecord(length, len(header), crc64(header))
        self._sums.append((layout, sums))
        if self._whole_sums:
            self.file_records[name] = FileRecord(length, _whole_sum(header, layout, sums))

    def _transfer(self, staged: Sequence[StagedShard], group: Sequence[PlannedShard], progress: Progress) -> Transfer:
        group_blocks = plan_blocks(group)
        pieces = [piece for shard in group for piece in shard.pieces]

        def tick(done: int) -> None:
            self._watch.check()
            progress.tick(done)

        taken = self._watch.begin_reading(pieces)
        try:
            transfer = engine.write(
                [file.file.fd for file in staged],
                group_blocks,
                pieces,
                access="direct" if self._durable else "buffered",
                start_writeback=self._durable,
                workers=self._watch.workers,
                taken=taken,
                windows=self._supply.windows(group) if self._supply is not None else None,
                tick=tick,
            )
        except TransferFault as fault:
            needed = sum(shard.reserved_bytes for shard in self._shards)
            call = fault.call if fault.file < 0 else f"{fault.call} of {fault.length} bytes at offset {fault.offset}"
            error = CallFailed(call, staged[max(fault.file, 0)].name, fault.errno, fault.detail or os.strerror(fault.errno))
            raise self._files.failure(error, needed) from fault
        self._watch.end_reading(pieces, transfer.sums)
        return transfer


def _whole_sum(header: bytes, layout: Shard, sums: Sequence[int]) -> int:
    """The checksum of a whole file, joined from those of its header and its tensors."""
    total = crc64(header)
    for tensor, tensor_sum in zip(layout.tensors, sums):
        total = joined(total, tensor_sum, tensor.nbytes)
    return total
