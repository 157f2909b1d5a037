"""Writes a checkpoint directory. Every verb that writes one calls `write_checkpoint`."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import NamedTuple

from shardsave._common.gc_pause import gc_paused
from shardsave._common.phases import Phases
from shardsave._common.progress import Progress
from shardsave._engine.totals import Totals
from shardsave._format.crc64 import crc64
from shardsave._format.file_names import DIRECTORY_INDEX, PART_TENSORS
from shardsave._format.index import Part, ShardRecord
from shardsave._saving.contents import Contents, PlannedDirectory
from shardsave._saving.frozen import remember
from shardsave._saving.reuse import Reuse as Reuse
from shardsave._saving.reuse import Unchanged, find_unchanged, take_over
from shardsave._saving.shards import ShardWriter, UnchangedShard
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


class _Names(NamedTuple):
    """The names of the files of a save. ``shards``: of the weights. ``all``: of all files with tensors, in the order of `all_shards`."""

    shards: list[str]
    extra: list[str]
    folders: list[str]
    all: list[str]


def write_checkpoint(
    contents: Contents,
    directory: str | os.PathLike[str],
    *,
    durable: bool,
    lock_timeout: float,
    progress: Progress,
    watch: Watch = UNWATCHED,
    reuse: Reuse | None = None,
) -> WriteOutcome:
    """Writes ``contents`` and commits them as the checkpoint of ``directory`` by one rename. ``lock_timeout`` is in seconds.

    ``watch`` is told how far the save is, and may end it by raising. ``reuse``: how unchanged shards are taken over; None: all are
    written. The caller issues the warnings of the outcome.
    Raises DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, a previous checkpoint is intact.
    Raises DurabilityUncertainError: the new checkpoint is in place, but may not survive a loss of power.
    """
    started = time.perf_counter()
    # Closed twice, since one interrupt may come at the beginning of a `close`, which then does nothing.
    transaction = Transaction(directory, durable=durable, lock_timeout=lock_timeout, waiting=watch.check)
    with closing(transaction), transaction:
        transaction.check_not_read(contents.state.files)
        contents, names, taken, notes = _take_over(transaction, contents, reuse, watch)
        to_write = {name: shard for name, shard in zip(names.all, contents.all_shards) if name not in taken}
        transaction.check_space(contents.reserved_bytes - sum(shard.planned.reserved_bytes for shard in taken.values()))
        whole_sums = contents.single_file is not None
        writer = ShardWriter(transaction, [*to_write.values()], [*to_write], watch, durable=durable, whole_sums=whole_sums)
        writer.reserve()
        companions = transaction.add_companions(contents.companions)
        for folder in names.folders:
            transaction.make_directory(folder)
        planned = time.perf_counter()
        writer.add_taken(taken, progress)
        writer.write(progress)
        if contents.single_file is not None:
            transaction.add_second_name(names.shards[0], contents.single_file)
            companions[contents.single_file] = writer.file_records[names.shards[0]]
        records = {name: writer.records[name] for name in names.all}
        parts, directory_bytes = _stage_parts(transaction, contents, names, records)
        transferred = time.perf_counter()
        with gc_paused():
            index = contents.index_for(
                names.shards, records, parts, companions, durable=durable, supersedes=transaction.supersedes, shared=[*taken]
            )
        outcome = transaction.commit(index, attempt=watch.attempt_commit)
    if reuse is not None:
        remember(reuse.frozen, writer.sums_of(reuse.frozen))
    return WriteOutcome(
        tensors=len(index.weight_map),
        shards=len(contents.shards),
        phases=Phases(
            plan=planned - started,
            transfer=transferred - planned - writer.sync_seconds,
            sync=writer.sync_seconds,
            commit=time.perf_counter() - transferred,
        ),
        totals=writer.totals,
        notes=tuple(dict.fromkeys([*notes, *writer.totals.notes, *outcome.notes, *outcome.warnings])),
        removed=outcome.removed,
        leftovers=outcome.leftovers,
        warnings=outcome.warnings,
        directory_bytes=directory_bytes,
        taken=tuple(taken),
        bytes_written=sum(shard.layout.data_bytes for shard in to_write.values()),
        bytes_reused=sum(shard.planned.layout.data_bytes for shard in taken.values()),
    )


def _take_over(
    transaction: Transaction, contents: Contents, reuse: Reuse | None, watch: Watch
) -> tuple[Contents, _Names, dict[str, UnchangedShard], list[str]]:
    """Names all files, and stages the shards that need not be written. Returns the contents with the shards as they will be, the names,
    the staged shards by name, and notes for the report."""
    unchanged = find_unchanged(transaction, contents, reuse, watch) if reuse is not None else Unchanged()
    with closing(unchanged):
        contents = contents.keeping([shard.planned for shard in unchanged.shards])
        names = _name_files(transaction, contents)
        shards = dict(zip(names.shards, contents.shards))
        every = reuse.recheck_every if reuse is not None else 1
        taken, more = take_over(transaction, unchanged, shards, every, watch)
    return contents, names, taken, [*contents.notes, *unchanged.notes, *more]


def _name_files(transaction: Transaction, contents: Contents) -> _Names:
    shards = list(transaction.shard_names(len(contents.shards)))
    extra = [transaction.part_name("extra", PART_TENSORS) for _ in contents.extra_shards]
    folders = [transaction.directory_name(directory.stem) for directory in contents.directories]
    in_folders = [f"{folder}/{file}" for folder, part in zip(folders, contents.directories) for file in part.shards]
    return _Names(shards, extra, folders, [*shards, *extra, *in_folders])


def _stage_parts(
    transaction: Transaction, contents: Contents, names: _Names, records: dict[str, ShardRecord]
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
    files = {name: records.pop(f"{folder}/{name}") for name in directory.shards}
    for name, document in directory.documents.items():
        files[name] = _stage(transaction, f"{folder}/{name}", document).record
    part = _stage(transaction, f"{folder}/{DIRECTORY_INDEX}", directory.index(files))
    return part, part.record.length + sum(record.length for record in files.values())


def _stage(transaction: Transaction, name: str, document: bytes) -> Part:
    transaction.stage(name, document)
    return Part(name, ShardRecord(len(document), len(document), crc64(document)))
