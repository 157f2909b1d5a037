"""The shards of a save: planned from the entries to store, then written and sealed in groups."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

from shardsave._common.os_calls import CallFailed, descriptor_allowance
from shardsave._common.progress import Progress
from shardsave._common.sources import ByteSource
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks
from shardsave._engine.totals import Totals
from shardsave._engine.transfer import BLOCK_BYTES, Transfer, TransferFault, Windows
from shardsave._format.crc64 import crc64, joined
from shardsave._format.header import encode_header, with_sums
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._format.packing import ALIGNMENT, Shard
from shardsave._saving.watch import Watch
from shardsave._storage.earlier import EarlierShard
from shardsave._storage.staging import StagedShard
from shardsave.errors import ShardSaveError

#: The most shards that are open at one time.
_MAX_OPEN_SHARDS = 256


class LayoutBytes:
    """What is computed from the layout of a shard alone. It is kept, since copies of a shard with other sources have the same layout."""

    def __init__(self) -> None:
        self._header: tuple[Shard, Mapping[str, str] | None, bytes] | None = None
        self._digest: tuple[Shard, str] | None = None

    def header(self, layout: Shard, more: Mapping[str, str] | None) -> bytes:
        """As `encode_header`."""
        if (known := self._header) is None or known[0] is not layout or known[1] != more:
            known = self._header = layout, more, encode_header(layout, more)
        return known[2]

    def digest(self, layout: Shard) -> str:
        """Equal for layouts with the same names and bytes."""
        if (known := self._digest) is None or known[0] is not layout:
            names = json.dumps([[tensor.name for tensor in layout.tensors], layout.data_bytes])
            known = self._digest = layout, hashlib.sha256(names.encode()).hexdigest()
        return known[1]


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """A shard before it is written: its layout, and the memory of its tensors in file order. ``more``: additional items of the
    ``__metadata__`` in its header. ``owner``: the rank that must write it; None if any rank may. ``layout_bytes``: copies share it."""

    layout: Shard
    pieces: list[ByteSource]
    more: Mapping[str, str] | None = None
    owner: int | None = None
    layout_bytes: LayoutBytes = field(default_factory=LayoutBytes)

    @property
    def header(self) -> bytes:
        """Its header without checksums. It is encoded at the first use, since the call of a save in the background needs none."""
        return self.layout_bytes.header(self.layout, self.more)

    @property
    def digest(self) -> str:
        """Equal for shards with the same names and bytes."""
        return self.layout_bytes.digest(self.layout)

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
        return self.with_pieces([new.get(id(piece), piece) for piece in self.pieces])

    def with_pieces(self, pieces: list[ByteSource]) -> PlannedShard:
        """The same shard with other sources of the same bytes, in file order."""
        return replace(self, pieces=pieces)


class Supply(Protocol):
    """Brings the bytes of pieces that other processes hold."""

    def windows(self, group: Sequence[PlannedShard]) -> Windows:
        """The windows of the engine's run that writes ``group``."""


class UnchangedShard(NamedTuple):
    """A shard that need not be written: as it is planned, the checksums of its tensors, and the file that has them."""

    planned: PlannedShard
    sums: tuple[int, ...]
    earlier: EarlierShard


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
