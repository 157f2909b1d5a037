"""The index: a Hugging Face index with our record as its last key, sealed by a checksum over all that stands before."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from shardsave._common.gc_pause import collector_still
from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._format.crc64 import crc64
from shardsave._format.header import CHECKSUM_KEY, MAX_HEADER_BYTES
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

INDEX_NAME = "model.safetensors.index.json"
LONE_NAME = "model.safetensors"

#: An index larger than this is neither written nor read, in bytes: 100,000 names need some 10 MB, and objects take many times their text.
MAX_INDEX_BYTES = 100_000_000

#: The version of the record that we write. A reader goes by ``requires``, not by this number.
VERSION = 1

#: The features that this reader knows; a record that requires another is refused.
SUPPORTED_FEATURES: frozenset[str] = frozenset()

#: Exactly the names that `shard_names` and `part_name` can make: what a save may remove once no index names it.
OWN_PATTERN = re.compile(
    r"model-(?:[0-9a-f]{8}-)?[0-9]{5}-of-[0-9]{5}\.safetensors|(?:(?:architecture|program)-[0-9a-f]{8}\.json|extra-[0-9a-f]{8}\.safetensors)"
)

_MAX_SHARDS = 99_999
_MEMBERS = {"durable", "flags", "metadata", "shards", "supersedes", "ties"}
_END = b'"}}\n'
_CRC = re.compile(r"[0-9a-f]{16}")
_NO_FILE_NAME = re.compile(r"[/\x00-\x1f\x7f]|\A\.{0,2}\Z")
_FLAG_WORDS: dict[bool | None, str] = {True: "frozen", False: "trainable", None: "none"}
_MODULE_FLAGS = {True: "frozen", False: "trainable"}


class ShardRecord(NamedTuple):
    """What the index knows of a shard: its length, that of its header (bytes), and the header's CRC-64/NVME."""

    length: int
    header_length: int
    header_crc: int


class Part(NamedTuple):
    """A file of the checkpoint that holds no tensor of ``weight_map``: an architecture, a program, or tensors of these.

    ``record``: as of a shard; where the whole file is JSON, its header is the whole file.
    """

    file: str
    record: ShardRecord


class FileRecord(NamedTuple):
    """What the index knows of a file beside the shards: its length in bytes, and the CRC-64/NVME of all of it."""

    length: int
    crc: int


class Superseded(NamedTuple):
    """The lone file that a save replaced: size in bytes and modification time in ns."""

    size: int
    mtime_ns: int


class Record(NamedTuple):
    """What we add to an index. ``flags``: name → frozen, of every parameter, tied names too; None where unknown.

    ``ties``: tied name → the name under which its bytes are stored. ``parts``: what it is → the file that has it.
    ``companions``: the files of fixed names that were saved beside the weights. ``module_flags``: as ``flags``, by the names in
    the module that was saved, where those on disk are others.
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


class Index(NamedTuple):
    """``weight_map``: stored name → file name. ``record`` is None in an index that others wrote, who may tell of ties all the same."""

    weight_map: Mapping[str, str]
    total_size: int
    record: Record | None
    ties_of_others: Mapping[str, str] = {}

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which its bytes are stored."""
        return self.record.ties if self.record is not None else self.ties_of_others


def told_ties(told: Mapping[str, Any], stored: Container[str]) -> dict[str, str]:
    """The ties in the metadata of others, as safetensors and the Hub's library write them: a name left out → the one stored."""
    pairs = [(name, kept) for name, kept in told.items() if name not in ("", "format", CHECKSUM_KEY) and isinstance(kept, str)]
    return {name: kept for name, kept in pairs if kept and kept in stored and name not in stored}


def check_shard_count(count: int) -> None:
    """Raises ValueError where there are not numbers enough for ``count`` shards."""
    if count > _MAX_SHARDS:
        raise ValueError(f"at most {_MAX_SHARDS} shards can be numbered, {count} would be needed; raise max_shard_size")


def shard_names(count: int, tag: str | None = None) -> tuple[str, ...]:
    """``model-00001-of-0000N.safetensors``, or with ``tag`` (eight hex digits) before the number."""
    check_shard_count(count)
    stem = "model" if tag is None else f"model-{tag}"
    return tuple(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def part_name(stem: str, tag: str, extension: str) -> str:
    """``architecture-1a2b3c4d.json``: never a name that was used before, so that a committed file is never replaced."""
    return f"{stem}-{tag}.{extension}"


@collector_still()
def encode_index(index: Index) -> bytes:
    """The bytes of an index that has our record."""
    record = index.record
    assert record is not None, "an index is written with our record"
    names = [*index.weight_map, *record.ties]
    ours: dict[str, Any] = {
        "version": VERSION,
        "requires": [],
        "writer": record.writer,
        "durable": record.durable,
        "flags": _encode_flags(record.flags, names),
        "ties": dict(record.ties),
        "metadata": dict(record.metadata),
        "shards": {name: _encode_shard(s) for name, s in record.shards.items()},
        **({"parts": {role: [p.file, *_encode_shard(p.record)] for role, p in record.parts.items()}} if record.parts else {}),
        "supersedes": {"size": s.size, "mtime_ns": s.mtime_ns} if (s := record.supersedes) is not None else None,
    }
    if record.companions:
        ours["companions"] = {name: [file.length, f"{file.crc:016x}"] for name, file in record.companions.items()}
    if record.module_flags is not None:
        ours["module_flags"] = {
            word: [name for name, frozen in record.module_flags.items() if frozen == flag]
            for flag, word in _MODULE_FLAGS.items()
        }
    text = json.dumps(
        {"metadata": {"total_size": index.total_size}, "weight_map": dict(index.weight_map), "shardsave": ours},
        ensure_ascii=False,
        allow_nan=False,
    )
    body = text[:-2].encode() + b', "crc64nvme": "'
    data = body + f"{crc64(body):016x}".encode() + _END
    if len(data) > MAX_INDEX_BYTES:
        raise ValueError(
            f"{len(names)} names and the metadata need an index of {len(data)} bytes, at most {MAX_INDEX_BYTES} "
            f"would be read again; nothing was committed"
        )
    return data


def _encode_shard(shard: ShardRecord) -> list[int | str]:
    return [shard.length, shard.header_length, f"{shard.header_crc:016x}"]


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


@collector_still()
def parse_index(data: bytes, where: str) -> Index:
    """Checks and reads an index. Raises CorruptCheckpointError, or IncompatibleCheckpointError for a feature unknown here.

    Every reason to refuse an index is in this function and those that it calls.
    """
    try:
        top = parse_object(data)
    except NotJSON as refusal:
        _bad(where, refusal.wanted, refusal.found)
    weight_map = top.get("weight_map")
    if not isinstance(weight_map, dict):
        _bad(where, "weight_map expected to map names to files", f"it is {glimpse(weight_map)}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            _bad(where, f"weight_map expected to map {glimpse(name)} to a file", f"it has {glimpse(shard)}")
    for shard in dict.fromkeys(weight_map.values()):
        _check_file_name(shard, where)
    told = top["metadata"] if isinstance(top.get("metadata"), dict) else {}
    total = told.get("total_size", 0)
    if "shardsave" not in top:
        return Index(weight_map, total if type(total) is int else 0, None, told_ties(told, weight_map))
    _check_seal(data, top["shardsave"], where)
    if type(total) is not int or total < 0:
        _bad(where, "total_size expected to be a number of bytes", f"it is {glimpse(total)}")
    return Index(weight_map, total, _parse_record(top["shardsave"], weight_map, where))


def _check_seal(data: bytes, ours: object, where: str) -> None:
    """The last member of our record is the checksum of every byte before its digits; nothing but ``"}}`` follows."""
    digits = data[-len(_END) - 16 : -len(_END)]
    written = ours.get("crc64nvme") if isinstance(ours, dict) else None
    if not data.endswith(_END) or not isinstance(written, str) or written.encode() != digits:
        _bad(where, "the record's checksum expected at the very end", "it is not there; the file was cut or changed")
    computed = f"{crc64(data[: -len(_END) - 16]):016x}"
    if computed != written:
        _bad(where, f"checksum {written} expected", f"it has {computed}; the file was changed after it was saved")


def _parse_record(ours: dict[str, Any], weight_map: Mapping[str, str], where: str) -> Record:
    requires = ours.get("requires")
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        _bad(where, "requires expected to be a list of features", f"it is {glimpse(requires)}")
    unknown = sorted(set(requires) - SUPPORTED_FEATURES)
    if unknown:
        raise IncompatibleCheckpointError(
            f"cannot read {where}: this version of shardsave knows {', '.join(sorted(SUPPORTED_FEATURES)) or 'no feature'}, "
            f"it requires {glimpse(unknown)}; the checkpoint is intact, read it with a newer version"
        )
    missing = sorted(_MEMBERS - ours.keys())
    if missing:
        _bad(where, f"the record expected to have {', '.join(sorted(_MEMBERS))}", f"it lacks {', '.join(missing)}")
    durable, metadata = ours["durable"], ours["metadata"]
    if not isinstance(metadata, dict):
        _bad(where, "metadata expected to be an object", f"it is {glimpse(metadata)}")
    if not isinstance(durable, bool):
        _bad(where, "durable expected to be true or false", f"it is {glimpse(durable)}")
    ties = _parse_ties(ours["ties"], weight_map, where)
    shards = _parse_shards(ours["shards"], where)
    unrecorded = sorted(set(weight_map.values()) - shards.keys())
    if unrecorded:
        _bad(where, f"a record of shard {unrecorded[0]} expected", "there is none")
    return Record(
        durable=durable,
        flags=_parse_flags(ours["flags"], [*weight_map, *ties], where),
        ties=ties,
        metadata=metadata,
        shards=shards,
        supersedes=_parse_superseded(ours["supersedes"], where),
        writer=str(ours.get("writer", "")),
        parts=_parse_parts(ours.get("parts", {}), where),
        companions=_parse_companions(ours.get("companions", {}), where),
        module_flags=_parse_module_flags(ours.get("module_flags"), where),
    )


def _parse_ties(ties: object, weight_map: Mapping[str, str], where: str) -> dict[str, str]:
    if not isinstance(ties, dict):
        _bad(where, "ties expected to map names to names", f"it is {glimpse(ties)}")
    for name, stored in ties.items():
        if name in weight_map:
            _bad(where, f"tie {glimpse(name)} expected not to be stored itself", "weight_map has it too")
        if not isinstance(stored, str) or stored not in weight_map:
            _bad(where, f"tie {glimpse(name)} expected to lead to a stored tensor", f"it leads to {glimpse(stored)}")
    return ties


def _parse_shards(shards: object, where: str) -> dict[str, ShardRecord]:
    if not isinstance(shards, dict):
        _bad(where, "shards expected to be an object", f"it is {glimpse(shards)}")
    parsed = {}
    for name, entry in shards.items():
        _check_file_name(name, where)
        parsed[name] = _parse_shard(f"shard {name}", entry, where)
    return parsed


def _parse_shard(what: str, entry: object, where: str) -> ShardRecord:
    if type(entry) is not list or [type(part) for part in entry] != [int, int, str] or not _CRC.fullmatch(entry[2]):
        _bad(where, f"{what} expected to have length, header length and checksum", f"it has {glimpse(entry)}")
    length, header_length, digits = entry
    if not 8 <= header_length <= min(length, MAX_HEADER_BYTES + 8):
        _bad(where, f"{what} expected to have a header inside of it", f"it has {glimpse(entry)}")
    return ShardRecord(length, header_length, int(digits, 16))


def _parse_parts(parts: object, where: str) -> dict[str, Part]:
    if not isinstance(parts, dict):
        _bad(where, "parts expected to be an object", f"it is {glimpse(parts)}")
    parsed = {}
    for role, entry in parts.items():
        if type(entry) is not list or not entry or not isinstance(entry[0], str):
            _bad(where, f"part {glimpse(role)} expected to begin with the name of its file", f"it has {glimpse(entry)}")
        _check_file_name(entry[0], where)
        parsed[role] = Part(entry[0], _parse_shard(f"part {entry[0]}", entry[1:], where))
    return parsed


def _parse_companions(companions: object, where: str) -> dict[str, FileRecord]:
    if not isinstance(companions, dict):
        _bad(where, "companions expected to be an object", f"it is {glimpse(companions)}")
    parsed = {}
    for name, entry in companions.items():
        _check_file_name(name, where)
        well_formed = type(entry) is list and [type(part) for part in entry] == [int, str] and _CRC.fullmatch(entry[1])
        if not well_formed or entry[0] < 0:
            _bad(where, f"companion {name} expected to have length and checksum", f"it has {glimpse(entry)}")
        parsed[name] = FileRecord(entry[0], int(entry[1], 16))
    return parsed


def _parse_flags(compact: object, names: Iterable[str], where: str) -> dict[str, bool] | None:
    if compact is None:
        return None
    meaning = {word: flag for flag, word in _FLAG_WORDS.items()}
    default = compact.get("default") if isinstance(compact, dict) else None
    if not isinstance(compact, dict) or not isinstance(default, str) or default not in meaning:
        _bad(where, f"flags expected to have a default of {', '.join(meaning)}", f"they are {glimpse(compact)}")
    flags: dict[str, bool | None] = dict.fromkeys(names, meaning[default])
    given: set[str] = set()
    for word, flag in meaning.items():
        listed = compact.get(word, [])
        if not isinstance(listed, list):
            _bad(where, f"a list of {word} names expected", f"it is {glimpse(listed)}")
        for name in listed:
            if not isinstance(name, str) or name not in flags:
                _bad(where, "flags expected to name tensors of the checkpoint", f"they name {glimpse(name)}")
            if name in given:
                _bad(where, "flags expected to name a tensor once", f"they name {glimpse(name)} twice")
            given.add(name)
            flags[name] = flag
    return {name: flag for name, flag in flags.items() if flag is not None}


def _parse_module_flags(lists: object, where: str) -> dict[str, bool] | None:
    if lists is None:
        return None
    if not isinstance(lists, dict):
        _bad(where, "module_flags expected to be an object", f"it is {glimpse(lists)}")
    flags: dict[str, bool] = {}
    for flag, word in _MODULE_FLAGS.items():
        listed = lists.get(word)
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            _bad(where, f"module_flags expected to list {word} names", f"it has {glimpse(listed)}")
        before = len(flags)
        flags.update(dict.fromkeys(listed, flag))
        if len(flags) != before + len(listed):
            _bad(where, "module_flags expected to name a parameter once", f"one of {glimpse(listed)} stands twice")
    return flags


def _parse_superseded(value: object, where: str) -> Superseded | None:
    if value is None:
        return None
    if not isinstance(value, dict) or type(value.get("size")) is not int or type(value.get("mtime_ns")) is not int:
        _bad(where, "supersedes expected to have size and mtime_ns", f"it is {glimpse(value)}")
    return Superseded(value["size"], value["mtime_ns"])


def is_file_name(name: str) -> bool:
    """Whether ``name`` is one path component, which a message can show and a file system can have."""
    return not _NO_FILE_NAME.search(name) and len(name.encode()) <= 255


def _check_file_name(name: str, where: str) -> None:
    if not is_file_name(name):
        _bad(where, "file names of one path component expected", f"it names {glimpse(name)}")


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: {wanted}, {found}; no shard was opened")
