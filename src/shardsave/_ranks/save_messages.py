"""What the ranks of a save tell each other, as bytes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict

from shardsave._engine.totals import Totals
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._saving.contents import Contents
from shardsave._saving.job import Committed, Names, Prepared, Written
from shardsave._saving.reuse import kept_shards, numbers_of
from shardsave._storage.transaction import CommitOutcome


def encode_prepared(prepared: Prepared, contents: Contents) -> bytes:
    """``contents``: as they were planned, which all ranks have."""
    told = [prepared.names, prepared.notes, [*prepared.taken], numbers_of(contents, prepared.kept)]
    return zlib.compress(json.dumps(told).encode(), 1)


def decode_prepared(data: bytes, contents: Contents) -> Prepared:
    told, notes, taken, numbers = json.loads(zlib.decompress(data))
    names, kept = Names(*told), kept_shards(contents, numbers)
    contents = contents.keeping(kept)
    shards = dict(zip(names.shards, contents.shards))
    return Prepared(contents, names, {name: shards[name] for name in taken}, notes, kept)


def encode_written(written: Written) -> bytes:
    return json.dumps([written.records, written.file_records, asdict(written.totals)]).encode()


def decode_written(data: bytes) -> Written:
    records, file_records, totals = json.loads(data)
    return Written(
        {name: ShardRecord(*record) for name, record in records.items()},
        {name: FileRecord(*record) for name, record in file_records.items()},
        Totals.of(totals),
    )


def joined(parts: Iterator[Written]) -> Written:
    """What all ranks have written."""
    records: dict[str, ShardRecord] = {}
    file_records: dict[str, FileRecord] = {}
    totals = Totals()
    for part in parts:
        records.update(part.records)
        file_records.update(part.file_records)
        totals = totals.joined(part.totals)
    return Written(records, file_records, totals)


def encode_committed(committed: Committed) -> bytes:
    tensors, directory_bytes, outcome, totals = committed
    return json.dumps([tensors, directory_bytes, outcome, asdict(totals)]).encode()


def decode_committed(data: bytes) -> Committed:
    tensors, directory_bytes, outcome, totals = json.loads(data)
    return Committed(tensors, directory_bytes, CommitOutcome(*map(tuple, outcome)), Totals.of(totals))
