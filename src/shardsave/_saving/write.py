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
from shardsave._saving.shards import ShardWriter
from shardsave._saving.watch import UNWATCHED as UNWATCHED
from shardsave._saving.watch import Watch as Watch
from shardsave._storage.transaction import Transaction


class WriteOutcome(NamedTuple):
    """What a committed write did. ``removed``: names of files that were removed or replaced, and that this save did not make.
    ``leftovers``: names of files that should have been removed and could not be. ``warnings``: those of ``notes`` that the caller must
    not overlook. ``directory_bytes``: the length of all files in the directories of parts."""

    tensors: int
    shards: int
    phases: Phases
    totals: Totals
    notes: tuple[str, ...]
    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    warnings: tuple[str, ...]
    directory_bytes: int


def write_checkpoint(
    contents: Contents,
    directory: str | os.PathLike[str],
    *,
    durable: bool,
    lock_timeout: float,
    progress: Progress,
    watch: Watch = UNWATCHED,
) -> WriteOutcome:
    """Writes ``contents`` and commits them as the checkpoint of ``directory`` by one rename. ``lock_timeout`` is in seconds.

    ``watch`` is told how far the save is, and may end it by raising. The caller issues the warnings of the outcome.
    Raises DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, a previous checkpoint is intact.
    Raises DurabilityUncertainError: the new checkpoint is in place, but may not survive a loss of power.
    """
    started = time.perf_counter()
    # Closed twice, since one interrupt may come at the beginning of a `close`, which then does nothing.
    transaction = Transaction(directory, durable=durable, lock_timeout=lock_timeout, waiting=watch.check)
    with closing(transaction), transaction:
        transaction.check_not_read(contents.state.files)
        names = list(transaction.shard_names(len(contents.shards)))
        extra_names = [transaction.part_name("extra", PART_TENSORS) for _ in contents.extra_shards]
        folders = [transaction.directory_name(directory.stem) for directory in contents.directories]
        in_folders = [f"{folder}/{file}" for folder, part in zip(folders, contents.directories) for file in part.shards]
        transaction.check_space(contents.reserved_bytes)
        all_names, whole_sums = [*names, *extra_names, *in_folders], contents.single_file is not None
        writer = ShardWriter(transaction, contents.all_shards, all_names, watch, durable=durable, whole_sums=whole_sums)
        writer.reserve()
        companions = transaction.add_companions(contents.companions)
        for folder in folders:
            transaction.make_directory(folder)
        planned = time.perf_counter()
        writer.write(progress)
        if contents.single_file is not None:
            transaction.add_second_name(names[0], contents.single_file)
            companions[contents.single_file] = writer.file_records[names[0]]
        parts = {role: _stage_document(transaction, role, document) for role, document in contents.documents.items()}
        for name in extra_names:
            parts["extra tensors"] = Part(name, writer.records.pop(name))
        directory_bytes = 0
        for folder, part in zip(folders, contents.directories):
            parts[part.role], length = _stage_directory(transaction, folder, part, writer.records)
            directory_bytes += length
        transferred = time.perf_counter()
        with gc_paused():
            index = contents.index_for(
                names, writer.records, parts, companions, durable=durable, supersedes=transaction.supersedes
            )
        outcome = transaction.commit(index, attempt=watch.attempt_commit)
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
        notes=tuple(dict.fromkeys([*contents.notes, *writer.totals.notes, *outcome.notes, *outcome.warnings])),
        removed=outcome.removed,
        leftovers=outcome.leftovers,
        warnings=outcome.warnings,
        directory_bytes=directory_bytes,
    )


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
