"""The index: a Hugging Face index with our record as its last key, sealed by a checksum over all that stands before."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from shardsave._crc64 import crc64
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

INDEX_NAME = "model.safetensors.index.json"
LONE_NAME = "model.safetensors"

#: The version of the record that we write. A reader goes by ``requires``, not by this number.
VERSION = 1

#: The features that this reader knows; a record that requires another is refused.
SUPPORTED_FEATURES: frozenset[str] = frozenset()

#: Exactly the names that `shard_names` can make.
SHARD_PATTERN = re.compile(r"model-(?:[0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors")

_MAX_SHARDS = 99_999
_END = b'"}}\n'
_FLAG_WORDS: dict[bool | None, str] = {True: "frozen", False: "trainable", None: "none"}


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the index knows of a shard: its length, that of its header (bytes), and the header's CRC-64/NVME."""

    length: int
    header_length: int
    header_crc: int


@dataclass(frozen=True, slots=True)
class Superseded:
    """The lone file that a save replaced: size in bytes and modification time in ns."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Record:
    """What we add to an index. ``flags``: name → frozen, of every parameter, tied names too; None where unknown.

    ``ties``: tied name → the name under which its bytes are stored.
    """

    durable: bool
    flags: Mapping[str, bool] | None
    ties: Mapping[str, str]
    metadata: Mapping[str, Any]
    shards: Mapping[str, ShardRecord]
    supersedes: Superseded | None
    writer: str


@dataclass(frozen=True, slots=True)
class Index:
    """``weight_map``: stored name → file name. ``record`` is None in an index that others wrote."""

    weight_map: Mapping[str, str]
    total_size: int
    record: Record | None


def shard_names(count: int, tag: str | None = None) -> tuple[str, ...]:
    """``model-00001-of-0000N.safetensors``, or with ``tag`` (eight hex digits) before the number."""
    if count > _MAX_SHARDS:
        raise ValueError(f"at most {_MAX_SHARDS} shards can be numbered, {count} would be needed; raise max_shard_size")
    stem = "model" if tag is None else f"model-{tag}"
    return tuple(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def encode_index(index: Index) -> bytes:
    """The bytes of an index that has our record."""
    record = index.record
    assert record is not None, "an index is written with our record"
    names = [*index.weight_map, *record.ties]
    ours = {
        "version": VERSION,
        "requires": [],
        "writer": record.writer,
        "durable": record.durable,
        "flags": _encode_flags(record.flags, names),
        "ties": dict(record.ties),
        "metadata": dict(record.metadata),
        "shards": {name: [s.length, s.header_length, f"{s.header_crc:016x}"] for name, s in record.shards.items()},
        "supersedes": {"size": s.size, "mtime_ns": s.mtime_ns} if (s := record.supersedes) is not None else None,
    }
    text = json.dumps(
        {"metadata": {"total_size": index.total_size}, "weight_map": dict(index.weight_map), "shardsave": ours},
        ensure_ascii=False,
        allow_nan=False,
    )
    body = text[:-2].encode() + b', "crc64nvme": "'
    return body + f"{crc64(body):016x}".encode() + _END


def _encode_flags(flags: Mapping[str, bool] | None, names: Iterable[str]) -> dict[str, Any] | None:
    if flags is None:
        return None
    words = {name: _FLAG_WORDS[flags.get(name)] for name in names}
    default = max(_FLAG_WORDS.values(), key=Counter(words.values()).__getitem__)
    compact: dict[str, Any] = {"default": default}
    for name, word in words.items():
        if word != default:
            compact.setdefault(word, []).append(name)
    return compact


def parse_index(data: bytes, where: str) -> Index:
    """Checks and reads an index. Raises CorruptCheckpointError, or IncompatibleCheckpointError for a feature unknown here."""
    top = _parse_json(data, where)
    weight_map = top.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _bad(where, "weight_map expected to map names to files", f"it is {_glimpse(weight_map)}")
    for shard in set(weight_map.values()):
        _check_file_name(shard, where)
    total = top["metadata"].get("total_size", 0) if isinstance(top.get("metadata"), dict) else 0
    if "shardsave" not in top:
        return Index(weight_map, total if type(total) is int else 0, None)
    _check_seal(data, top["shardsave"], where)
    if type(total) is not int or total < 0:
        _bad(where, "total_size expected to be a number of bytes", f"it is {_glimpse(total)}")
    return Index(weight_map, total, _parse_record(top["shardsave"], weight_map, where))


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            _bad(where, "keys expected once", f"{twice!r} stands twice")
        return made

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")

    try:
        top = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        _bad(where, "JSON expected", "it is nested too deeply")
    except UnicodeDecodeError as error:
        _bad(where, "UTF-8 expected", f"byte {error.start} is not")
    except ValueError as error:
        _bad(where, "JSON expected", str(error))
    if not isinstance(top, dict):
        _bad(where, "a JSON object expected", f"it is a {type(top).__name__}")
    return top


def _check_seal(data: bytes, ours: object, where: str) -> None:
    """The last member of our record is the checksum of every byte before its digits; nothing but ``"}}`` follows."""
    digits = data[-len(_END) - 16 : -len(_END)]
    written = ours.get("crc64nvme") if isinstance(ours, dict) else None
    if not data.endswith(_END) or not isinstance(written, str) or written.encode(errors="replace") != digits:
        _bad(where, "the record's checksum expected at the very end", "it is not there; the file was cut or changed")
    computed = f"{crc64(data[: -len(_END) - 16]):016x}"
    if computed != written:
        _bad(where, f"checksum {written} expected", f"it has {computed}; the file was changed after it was saved")


def _parse_record(ours: dict[str, Any], weight_map: Mapping[str, str], where: str) -> Record:
    requires = ours.get("requires")
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        _bad(where, "requires expected to be a list of features", f"it is {_glimpse(requires)}")
    unknown = sorted(set(requires) - SUPPORTED_FEATURES)
    if unknown:
        raise IncompatibleCheckpointError(
            f"cannot read {where}: it requires {', '.join(unknown)}, this version of shardsave knows "
            f"{', '.join(sorted(SUPPORTED_FEATURES)) or 'no such feature'}; the checkpoint is intact, read it with a newer version"
        )
    ties, metadata = ours.get("ties"), ours.get("metadata")
    if not isinstance(ties, dict) or not all(isinstance(stored, str) for stored in ties.values()):
        _bad(where, "ties expected to map names to names", f"it is {_glimpse(ties)}")
    for name, stored in ties.items():
        if stored not in weight_map or name in weight_map:
            _bad(where, f"tie {name!r} expected to lead to a stored tensor and not to be one", f"it leads to {stored!r}")
    if not isinstance(metadata, dict):
        _bad(where, "metadata expected to be an object", f"it is {_glimpse(metadata)}")
    if type(ours.get("durable")) is not bool:
        _bad(where, "durable expected to be true or false", f"it is {_glimpse(ours.get('durable'))}")
    shards = _parse_shards(ours.get("shards"), where)
    missing = sorted(set(weight_map.values()) - shards.keys())
    if missing:
        _bad(where, f"a record of shard {missing[0]} expected", "there is none")
    return Record(
        durable=ours["durable"],
        flags=_parse_flags(ours.get("flags"), [*weight_map, *ties], where),
        ties=ties,
        metadata=metadata,
        shards=shards,
        supersedes=_parse_superseded(ours.get("supersedes"), where),
        writer=str(ours.get("writer", "")),
    )


def _parse_shards(shards: object, where: str) -> dict[str, ShardRecord]:
    if not isinstance(shards, dict):
        _bad(where, "shards expected to be an object", f"it is {_glimpse(shards)}")
    parsed = {}
    for name, entry in shards.items():
        _check_file_name(name, where)
        if type(entry) is not list or [type(part) for part in entry] != [int, int, str] or not _is_crc(entry[2]):
            _bad(where, f"shard {name} expected to have length, header length and checksum", f"it has {_glimpse(entry)}")
        parsed[name] = ShardRecord(entry[0], entry[1], int(entry[2], 16))
    return parsed


def _is_crc(digits: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{16}", digits) is not None


def _parse_flags(compact: object, names: Iterable[str], where: str) -> dict[str, bool] | None:
    if compact is None:
        return None
    meaning = {word: flag for flag, word in _FLAG_WORDS.items()}
    if not isinstance(compact, dict) or compact.get("default") not in meaning:
        _bad(where, "flags expected to have a default", f"it is {_glimpse(compact)}")
    flags: dict[str, bool | None] = dict.fromkeys(names, meaning[compact["default"]])
    for word, flag in meaning.items():
        for name in compact.get(word, ()):
            if not isinstance(name, str) or name not in flags:
                _bad(where, "flags expected to name tensors of the checkpoint", f"it names {_glimpse(name)}")
            flags[name] = flag
    return {name: flag for name, flag in flags.items() if flag is not None}


def _parse_superseded(value: object, where: str) -> Superseded | None:
    if value is None:
        return None
    if not isinstance(value, dict) or type(value.get("size")) is not int or type(value.get("mtime_ns")) is not int:
        _bad(where, "supersedes expected to have size and mtime_ns", f"it is {_glimpse(value)}")
    return Superseded(value["size"], value["mtime_ns"])


def _check_file_name(name: str, where: str) -> None:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        _bad(where, "file names of one path component expected", f"it names {_glimpse(name)}")


def _glimpse(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: {wanted}, {found}")
