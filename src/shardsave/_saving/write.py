"""Writes a checkpoint directory. Every verb that writes one calls `write_checkpoint`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import NamedTuple

from shardsave._common.gc_pause import gc_paused
from shardsave._common.phases import Phases
from shardsave._common.progress import Progress
from shardsave._engine.totals import Totals
from shardsave._format.crc64 import crc64
from shardsave._format.file_names import DIRECTORY_INDEX, PART_TENSORS
from shardsave._format.index import FileRecord, Part, ShardRecord
from shardsave._saving.comparison import Comparison
from shardsave._saving.contents import Contents, PlannedDirectory
from shardsave._saving.job import ALONE, Committed, Job, Names, Prepared, Written
from shardsave._saving.reuse import Reuse as Reuse
from shardsave._saving.reuse import Unchanged, find_unchanged, take_over
from shardsave._saving.shards import PlannedShard, ShardWriter, UnchangedShard
from shardsave._saving.watch import UNWATCHED as UNWATCHED
from shardsave._saving.watch import Watch as Watch
from shardsave._storage.transaction import Transaction


class WriteOutcome(NamedTuple):
    """What a committed write did. ``removed``: names of files that were removed or replaced, and that this save did not make.
    ``leftovers``: names of files that should have been removed and could not be. ``warnings``: those of ``notes`` that the caller must
    not overlook. ``directory_bytes``: the length of all files in the directories of parts. ``taken``: the shards that were taken over from
    an earlier checkpoint; ``bytes_reused``: of the tensors in them; ``bytes_written``: of all other tensors, those of parts included."""

    tensors: int
    shards: int
    phases: Phases
    totals: Totals
    notes: tuple[str, ...]
    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    warnings: tuple[str, ...]
    directory_bytes: int
    taken: tuple[str, ...]
    bytes_written: int
    bytes_reused: int


def write_checkpoint(
    contents: Contents,
    directory: str | os.PathLike[str],
    *,
    durable: bool,
    lock_timeout: float,
    progress: Progress,
    watch: Watch = UNWATCHED,
    reuse: Reuse | None = None,
    job: Job = ALONE,
    locked: Callable[[], object] | None = None,
) -> WriteOutcome:
    """Writes ``contents`` and commits them as the checkpoint of ``directory`` by one rename. ``lock_timeout`` is in seconds.

    ``watch`` is told how far the save is, and may end it by raising. ``reuse``: how unchanged shards are taken over; None: all are
    written. ``job``: who takes part. ``locked``: called by the process that leads once it has the directory's lock; what it raises ends
    the save. The caller issues the warnings of the outcome.
    Raises DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, a previous checkpoint is intact.
    Raises DurabilityUncertainError: the new checkpoint is in place, but may not survive a loss of power.
    """
    started = time.perf_counter()
    watch = job.watch(watch)
    # Closed twice, since one interrupt may come at the beginning of a `close`, which then does nothing.
    transaction = Transaction(directory, durable=durable, lock_timeout=lock_timeout, waiting=watch.check)
    lead = _Lead(transaction, contents, watch, reuse, locked)
    with closing(transaction), job.files(transaction) as files:
        frozen = reuse.frozen if reuse is not None else {}
        prepared = job.prepare(contents, lead.prepare, frozen, watch)
        contents, taken = prepared.contents, prepared.taken
        with job.share(prepared.to_write, prepared.documents) as share:
            whole_sums = contents.single_file is not None
            writer = ShardWriter(files, share.shards, watch, durable=durable, whole_sums=whole_sums, supply=share.supply)
            writer.reserve()
            own = [*share.shards.values(), *share.apart.values()]
            progress.expect(_bytes_of(own) + _bytes_of(shard.planned for shard in lead.taken.values()))
            job.stage(lead.stage)
            planned = time.perf_counter()
            writer.add_taken(lead.taken, progress)
            writer.write(progress)
            writer.write_apart(share.apart, share.documents, progress)
        written = job.collect(Written(writer.records, writer.file_records, writer.totals))
        transferred = time.perf_counter()
        committed = job.commit(partial(lead.commit, written, durable=durable))
    if reuse is not None:
        job.remember(frozen, writer.sums_of)
    tensors, directory_bytes, outcome, totals = committed
    return WriteOutcome(
        tensors=tensors,
        shards=len(contents.shards),
        phases=Phases(
            plan=planned - started,
            transfer=transferred - planned - writer.sync_seconds,
            sync=writer.sync_seconds,
            commit=time.perf_counter() - transferred,
        ),
        totals=totals,
        notes=tuple(dict.fromkeys([*prepared.notes, *totals.notes, *outcome.notes, *outcome.warnings])),
        removed=outcome.removed,
        leftovers=outcome.leftovers,
        warnings=outcome.warnings,
        directory_bytes=directory_bytes,
        taken=tuple(taken),
        bytes_written=_bytes_of(prepared.to_write.values()) + _bytes_of_others(contents),
        bytes_reused=_bytes_of(taken.values()),
    )


def _bytes_of_others(contents: Contents) -> int:
    """The bytes of tensors in the files that other processes write into directories of parts."""
    return sum(other.data_bytes for directory in contents.directories for other in directory.others.values())


def _bytes_of(shards: Iterable[PlannedShard]) -> int:
    return sum(shard.layout.data_bytes for shard in shards)


class _Lead:
    """What one process does for a whole save, in three steps. The transaction is entered.

    ``taken``: the shards that it has taken over from an earlier checkpoint, by name.
    """

    def __init__(
        self,
        transaction: Transaction,
        contents: Contents,
        watch: Watch,
        reuse: Reuse | None,
        locked: Callable[[], object] | None,
    ) -> None:
        self._locked = locked
        self._transaction = transaction
        self._contents = contents
        self._watch = watch
        self._reuse = reuse
        self._companions: dict[str, FileRecord] = {}
        self.taken: Mapping[str, UnchangedShard] = {}

    def prepare(self, comparison: Comparison) -> Prepared:
        """Names all files, stages the shards that need not be written, and checks that there is room for the others."""
        if self._locked is not None:
            self._locked()
        self._transaction.check_not_read(self._contents.state.files)
        self._prepared = prepared = self._take_over(comparison)
        reserved = prepared.contents.reserved_bytes - sum(shard.reserved_bytes for shard in prepared.taken.values())
        self._transaction.check_space(reserved)
        return prepared

    def _take_over(self, comparison: Comparison) -> Prepared:
        """Names all files, and stages the shards that need not be written."""
        transaction, contents, reuse = self._transaction, self._contents, self._reuse
        unchanged = Unchanged()
        if reuse is not None:
            unchanged = find_unchanged(transaction, contents, reuse, comparison, self._watch)
        with closing(unchanged):
            kept = [shard.planned for shard in unchanged.shards]
            contents = contents.keeping(kept)
            names = _name_files(transaction, contents)
            shards = dict(zip(names.shards, contents.shards))
            every = reuse.recheck_every if reuse is not None else 1
            self.taken, more = take_over(transaction, unchanged, shards, every, comparison, self._watch)
        taken = {name: shard.planned for name, shard in self.taken.items()}
        return Prepared(contents, names, taken, [*contents.notes, *unchanged.notes, *more], kept)

    def stage(self) -> None:
        """Stages the companions, and the directories of parts."""
        self._companions = self._transaction.add_companions(self._prepared.contents.companions)
        for folder in self._prepared.names.folders:
            self._transaction.make_directory(folder)

    def commit(self, written: Written, *, durable: bool) -> Committed:
        """Stages what belongs to the shards, which are all sealed, and commits."""
        contents, names = self._prepared.contents, self._prepared.names
        if contents.single_file is not None:
            self._transaction.add_second_name(names.shards[0], contents.single_file)
            self._companions[contents.single_file] = written.file_records[names.shards[0]]
        records = {name: written.records[name] for name in names.all}
        parts, directory_bytes = _stage_parts(self._transaction, contents, names, records)
        with gc_paused():
            index = contents.index_for(
                names.shards,
                records,
                parts,
                self._companions,
                durable=durable,
                supersedes=self._transaction.supersedes,
                shared=[*self.taken],
            )
        outcome = self._transaction.commit(index, attempt=self._watch.attempt_commit)
        return Committed(len(index.weight_map), directory_bytes, outcome, written.totals)


def _name_files(transaction: Transaction, contents: Contents) -> Names:
    shards = list(transaction.shard_names(len(contents.shards)))
    extra = [transaction.part_name("extra", PART_TENSORS) for _ in contents.extra_shards]
    folders = [transaction.directory_name(directory.stem) for directory in contents.directories]
    in_folders = [
        f"{folder}/{file}" for folder, part in zip(folders, contents.directories) for file in (*part.shards, *part.others)
    ]
    return Names(shards, extra, folders, [*shards, *extra, *in_folders])


def _stage_parts(
    transaction: Transaction, contents: Contents, names: Names, records: dict[str, ShardRecord]
) -> tuple[dict[str, Part], int]:
    """Stages the documents of all parts. ``records``: those of all files with tensors; loses those that are no weights.

    Also returns the length of all files in the directories of parts.
    """
    parts = {role: _stage_document(transaction, role, document) for role, document in contents.documents.items()}
    for name in names.extra:
        parts["extra tensors"] = Part(name, records.pop(name))
    directory_bytes = 0
    for folder, part in zip(names.folders, contents.directories):
        parts[part.role], length = _stage_directory(transaction, folder, part, records)
        directory_bytes += length
    return parts, directory_bytes


def _stage_document(transaction: Transaction, role: str, document: bytes) -> Part:
    return _stage(transaction, transaction.part_name(role, "json"), document)


def _stage_directory(
    transaction: Transaction, folder: str, directory: PlannedDirectory, records: dict[str, ShardRecord]
) -> tuple[Part, int]:
    """Stages the documents in ``folder``. ``records``: those of all sealed shards; loses those of shards in ``folder``.

    Also returns the length of all files there.
    """
    files = {name: records.pop(f"{folder}/{name}") for name in (*directory.shards, *directory.others)}
    for name, document in directory.documents.items():
        files[name] = _stage(transaction, f"{folder}/{name}", document).record
    part = _stage(transaction, f"{folder}/{DIRECTORY_INDEX}", directory.index(files))
    return part, part.record.length + sum(record.length for record in files.values())


def _stage(transaction: Transaction, name: str, document: bytes) -> Part:
    transaction.stage(name, document)
    return Part(name, ShardRecord(len(document), len(document), crc64(document)))
