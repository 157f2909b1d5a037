"""The index of a checkpoint: its types, and how it is written.

The index is a Hugging Face index. Its last key holds shardsave's record, and the record ends with a checksum of all bytes before it.
`index_parsing` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Mapping
from math import inf, isfinite, nan
from typing import Any, NamedTuple

from shardsave._common.gc_pause import gc_paused
from shardsave._common.strict_json import NotJSON, check_memory
from shardsave._format.crc64 import crc64
from shardsave._format.freeze_flags import encode_flags, encode_module_flags
from shardsave._format.header import CHECKSUM_KEY

#: The largest index that is written or read, in bytes. 100,000 names need some 10 MB; as Python objects they need many times that.
MAX_INDEX_BYTES = 100_000_000

#: The version of the record that is written. A reader decides by ``requires``, not by this number.
VERSION = 2

#: The feature that a reader must know if a part has a directory of its own.
PART_DIRECTORIES = "part directories"

#: The role of the training state, which always has a directory of its own.
TRAINING = "training state"

#: What a metric may be instead of a JSON number.
NOT_FINITE = {"nan": nan, "inf": inf, "-inf": -inf}

#: What follows the checksum, which is the last value of the record.
END = b'"}}\n'


class ShardRecord(NamedTuple):
    """What the index says about a shard: its length and its header's length in bytes, and the header's CRC-64/NVME."""

    length: int
    header_length: int
    header_crc: int


class Part(NamedTuple):
    """A file of the checkpoint without tensors of ``weight_map``: an architecture, a program, or the extra tensors of these.

    ``record`` is as for a shard; a JSON file counts as header from beginning to end. A part with a directory of its own has the file
    ``training-1a2b3c4d/index.json``, which has the records of all other files in that directory.
    """

    file: str
    record: ShardRecord

    @property
    def directory(self) -> str | None:
        """The part's own directory; None if it has none."""
        directory, slash, _ = self.file.partition("/")
        return directory if slash else None


class FileRecord(NamedTuple):
    """What the index says about a file beside the shards: its length in bytes, and the CRC-64/NVME of the whole file."""

    length: int
    crc: int


class Superseded(NamedTuple):
    """The single-file checkpoint that a save replaced: size in bytes and modification time in ns."""

    size: int
    mtime_ns: int


class Moment(NamedTuple):
    """The moment of a training at which a checkpoint was saved; None for what the saver did not say.

    ``metrics``: name → number. ``ranks``: how many processes saved. ``created``: when, such as ``2026-11-30T05:40:00Z``.
    """

    step: int | None = None
    epoch: float | None = None
    metrics: Mapping[str, float] = {}
    ranks: int | None = None
    created: str | None = None


class Record(NamedTuple):
    """What shardsave adds to an index.

    ``flags``: name → frozen, for every parameter, including tied names; None if unknown.
    ``ties``: tied name → the name under which its bytes are stored. ``parts``: role → file.
    ``companions``: the files with fixed names that were saved beside the weights. ``module_flags``: like ``flags``, but with the names
    in the saved module, if the names on disk are different. ``shared``: the shards that were taken over from an earlier checkpoint.
    """

    durable: bool
    flags: Mapping[str, bool] | None
    ties: Mapping[str, str]
    metadata: Mapping[str, Any]
    shards: Mapping[str, ShardRecord]
    supersedes: Superseded | None
    writer: str
    parts: Mapping[str, Part] = {}
    companions: Mapping[str, FileRecord] = {}
    module_flags: Mapping[str, bool] | None = None
    moment: Moment = Moment()
    shared: tuple[str, ...] = ()


class Index(NamedTuple):
    """``weight_map``: stored name → file name. ``record`` is None in a third-party index, whose metadata may still list ties."""

    weight_map: Mapping[str, str]
    total_size: int
    record: Record | None
    foreign_ties: Mapping[str, str] = {}

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which its bytes are stored."""
        return self.record.ties if self.record is not None else self.foreign_ties


def ties_in_metadata(metadata: Mapping[str, Any], stored: Container[str]) -> dict[str, str]:
    """The ties in third-party metadata, as safetensors and huggingface_hub write them: omitted name → stored name."""
    reserved = ("", "format", CHECKSUM_KEY)
    pairs = [(name, target) for name, target in metadata.items() if name not in reserved and isinstance(target, str)]
    return {name: target for name, target in pairs if target and target in stored and name not in stored}


@gc_paused()
def encode_index(index: Index) -> bytes:
    """The bytes of an index that has a record."""
    record = index.record
    assert record is not None, "an index is written with a record"
    names = [*index.weight_map, *record.ties]
    document = {
        "metadata": {"total_size": index.total_size},
        "weight_map": dict(index.weight_map),
        "shardsave": _encode_record(record, names),
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False)
    body = text[:-2].encode() + b', "crc64nvme": "'
    data = body + f"{crc64(body):016x}".encode() + END
    if len(data) > MAX_INDEX_BYTES:
        raise ValueError(
            f"{len(names)} names and the metadata need an index of {len(data)} bytes, at most {MAX_INDEX_BYTES} "
            f"would be read again; nothing was committed"
        )
    try:
        check_memory(data)
    except NotJSON as refusal:
        raise ValueError(
            f"{len(names)} names and the metadata need an index that could not be read again: {refusal.wanted}, {refusal.found}; "
            f"nothing was committed"
        ) from None
    return data


def _encode_record(record: Record, names: Collection[str]) -> dict[str, Any]:
    encoded: dict[str, Any] = {
        "version": VERSION,
        "requires": [PART_DIRECTORIES] if any(part.directory for part in record.parts.values()) else [],
        "writer": record.writer,
        "durable": record.durable,
        "flags": encode_flags(record.flags, names),
        "ties": dict(record.ties),
        "metadata": dict(record.metadata),
        "shards": {name: encode_shard(shard) for name, shard in record.shards.items()},
    }
    if record.shared:
        encoded["shared"] = list(record.shared)
    if record.parts:
        encoded["parts"] = {role: [part.file, *encode_shard(part.record)] for role, part in record.parts.items()}
    encoded["supersedes"] = record.supersedes._asdict() if record.supersedes is not None else None
    if record.companions:
        encoded["companions"] = {name: [file.length, f"{file.crc:016x}"] for name, file in record.companions.items()}
    if record.module_flags is not None:
        encoded["module_flags"] = encode_module_flags(record.module_flags)
    return encoded | _encode_moment(record.moment)


def _encode_moment(moment: Moment) -> dict[str, Any]:
    """The members that are known. JSON has no NaN and no infinity, so a metric with such a value is a string."""
    members = moment._asdict() | {"metrics": {name: encode_number(value) for name, value in moment.metrics.items()} or None}
    return {name: value for name, value in members.items() if value is not None}


def encode_number(value: float) -> float | str:
    """A number as JSON: ``"nan"``, ``"inf"`` and ``"-inf"`` are strings."""
    return value if isinstance(value, int) or isfinite(value) else str(value)


def encode_shard(shard: ShardRecord) -> list[int | str]:
    """The record of a shard, or of a file in the directory of a part, as JSON."""
    return [shard.length, shard.header_length, f"{shard.header_crc:016x}"]
