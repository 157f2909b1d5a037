"""Reads an index. Every reason to refuse one is in this file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any, NoReturn

from shardsave._common.gc_pause import gc_paused
from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._format.crc64 import crc64
from shardsave._format.file_names import DIRECTORY_INDEX, MAX_SHARDS, is_file_name
from shardsave._format.freeze_flags import FLAG_WORDS, MODULE_FLAG_WORDS
from shardsave._format.header import MAX_HEADER_BYTES
from shardsave._format.index import (
    END,
    NOT_FINITE,
    PART_DIRECTORIES,
    TRAINING,
    FileRecord,
    Index,
    Moment,
    Part,
    Record,
    ShardRecord,
    Superseded,
    ties_in_metadata,
)
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

#: The features that this reader knows; a record that requires any other feature is refused.
SUPPORTED_FEATURES = frozenset({PART_DIRECTORIES})

#: What every record must have.
_MEMBERS = {"durable", "flags", "metadata", "shards", "supersedes", "ties"}

_CRC = re.compile(r"[0-9a-f]{16}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


@gc_paused()
def parse_index(data: bytes, where: str) -> Index:
    """Checks an index and returns it; ``where`` names it in messages.

    Raises CorruptCheckpointError, or IncompatibleCheckpointError if it requires a feature that this version does not know.
    """
    try:
        top = parse_object(data)
    except NotJSON as refusal:
        _bad(where, refusal.wanted, refusal.found)
    weight_map = top.get("weight_map")
    if not isinstance(weight_map, dict):
        _bad(where, "weight_map expected to map names to files", f"it is {glimpse(weight_map)}")
    files: dict[str, str] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            _bad(where, f"weight_map expected to map {glimpse(name)} to a file", f"it has {glimpse(shard)}")
        weight_map[name] = files.setdefault(
            shard, shard
        )  # one string for each file: one for each name takes as much as the index
    _check_count(files, where)
    for shard in files:
        _check_file_name(shard, where)
    metadata = top["metadata"] if isinstance(top.get("metadata"), dict) else {}
    total = metadata.get("total_size", 0)
    if "shardsave" not in top:
        return Index(weight_map, total if type(total) is int else 0, None, ties_in_metadata(metadata, weight_map))
    _check_seal(data, top["shardsave"], where)
    if type(total) is not int or total < 0:
        _bad(where, "total_size expected to be a number of bytes", f"it is {glimpse(total)}")
    return Index(weight_map, total, _parse_record(top["shardsave"], weight_map, where))


def _check_seal(data: bytes, record: object, where: str) -> None:
    """Checks the last member of the record: the checksum of every byte before its digits, followed only by ``"}}`` and a newline."""
    digits = data[-len(END) - 16 : -len(END)]
    written = record.get("crc64nvme") if isinstance(record, dict) else None
    if not data.endswith(END) or not isinstance(written, str) or written.encode() != digits:
        _bad(where, "the record's checksum expected at the very end", "it is not there; the file was cut or changed")
    computed = f"{crc64(data[: -len(END) - 16]):016x}"
    if computed != written:
        _bad(where, f"checksum {written} expected", f"it has {computed}; the file was changed after it was saved")


def _parse_record(members: dict[str, Any], weight_map: Mapping[str, str], where: str) -> Record:
    requires = members.get("requires")
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        _bad(where, "requires expected to be a list of features", f"it is {glimpse(requires)}")
    unknown = sorted(set(requires) - SUPPORTED_FEATURES)
    if unknown:
        raise IncompatibleCheckpointError(
            f"cannot read {where}: this version of shardsave knows {glimpse(sorted(SUPPORTED_FEATURES))}, it requires {glimpse(unknown)}; "
            f"the checkpoint is intact, read it with a newer version"
        )
    missing = sorted(_MEMBERS - members.keys())
    if missing:
        _bad(where, f"the record expected to have {', '.join(sorted(_MEMBERS))}", f"it lacks {', '.join(missing)}")
    durable, metadata = members["durable"], members["metadata"]
    if not isinstance(metadata, dict):
        _bad(where, "metadata expected to be an object", f"it is {glimpse(metadata)}")
    if not isinstance(durable, bool):
        _bad(where, "durable expected to be true or false", f"it is {glimpse(durable)}")
    ties = _parse_ties(members["ties"], weight_map, where)
    shards = _parse_shards(members["shards"], where)
    unrecorded = sorted(set(weight_map.values()) - shards.keys())
    if unrecorded:
        _bad(where, f"a record of shard {unrecorded[0]} expected", "there is none")
    return Record(
        durable=durable,
        flags=_parse_flags(members["flags"], [*weight_map, *ties], where),
        ties=ties,
        metadata=metadata,
        shards=shards,
        supersedes=_parse_superseded(members["supersedes"], where),
        writer=str(members.get("writer", "")),
        parts=_parse_parts(members.get("parts", {}), PART_DIRECTORIES in requires, where),
        companions=_parse_companions(members.get("companions", {}), where),
        module_flags=_parse_module_flags(members.get("module_flags"), where),
        moment=_parse_moment(members, where),
        shared=_parse_shared(members.get("shared", []), shards, where),
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
    _check_count(shards, where)
    for name in shards:
        _check_file_name(name, where)
    return {name: parse_shard(f"shard {name}", entry, where) for name, entry in shards.items()}


def _parse_shared(shared: object, shards: Mapping[str, ShardRecord], where: str) -> tuple[str, ...]:
    if not isinstance(shared, list) or not all(isinstance(name, str) and name in shards for name in shared):
        _bad(where, "shared expected to list shards", f"it has {glimpse(shared)}")
    return tuple(dict.fromkeys(shared))


def parse_shard(what: str, entry: object, where: str) -> ShardRecord:
    """Reads a record; ``what`` names its file. Raises CorruptCheckpointError."""
    if type(entry) is not list or [type(item) for item in entry] != [int, int, str] or not _CRC.fullmatch(entry[2]):
        _bad(where, f"{what} expected to have length, header length and checksum", f"it has {glimpse(entry)}")
    length, header_length, digits = entry
    if not 8 <= header_length <= min(length, MAX_HEADER_BYTES + 8):
        _bad(where, f"{what} expected to have a header inside of it", f"it has {glimpse(entry)}")
    return ShardRecord(length, header_length, int(digits, 16))


def _parse_parts(parts: object, directories: bool, where: str) -> dict[str, Part]:
    """``directories``: whether a part may have a directory of its own."""
    if not isinstance(parts, dict):
        _bad(where, "parts expected to be an object", f"it is {glimpse(parts)}")
    parsed = {}
    for role, entry in parts.items():
        if type(entry) is not list or not entry or not isinstance(entry[0], str):
            _bad(where, f"part {glimpse(role)} expected to begin with the name of its file", f"it has {glimpse(entry)}")
        directory, slash, _ = entry[0].rpartition(f"/{DIRECTORY_INDEX}")
        _check_file_name(directory if slash and directories else entry[0], where)
        parsed[role] = Part(entry[0], parse_shard(f"part {entry[0]}", entry[1:], where))
    if TRAINING in parsed and parsed[TRAINING].directory is None:
        _bad(where, f"part {TRAINING!r} expected to have a directory of its own", f"it is {parsed[TRAINING].file}")
    return parsed


def _parse_companions(companions: object, where: str) -> dict[str, FileRecord]:
    if not isinstance(companions, dict):
        _bad(where, "companions expected to be an object", f"it is {glimpse(companions)}")
    return {name: _parse_companion(name, entry, where) for name, entry in companions.items()}


def _parse_companion(name: str, entry: object, where: str) -> FileRecord:
    _check_file_name(name, where)
    if type(entry) is not list or [type(item) for item in entry] != [int, str] or not _CRC.fullmatch(entry[1]) or entry[0] < 0:
        _bad(where, f"companion {name} expected to have length and checksum", f"it has {glimpse(entry)}")
    length, digits = entry
    return FileRecord(length, int(digits, 16))


def _parse_flags(compact: object, names: Iterable[str], where: str) -> dict[str, bool] | None:
    if compact is None:
        return None
    meaning = {word: flag for flag, word in FLAG_WORDS.items()}
    default = compact.get("default") if isinstance(compact, dict) else None
    if not isinstance(compact, dict) or not isinstance(default, str) or default not in meaning:
        _bad(where, f"flags expected to have a default of {', '.join(meaning)}", f"they are {glimpse(compact)}")
    flags: dict[str, bool | None] = dict.fromkeys(names, meaning[default])
    named: set[str] = set()
    for word, flag in meaning.items():
        listed = compact.get(word, [])
        if not isinstance(listed, list):
            _bad(where, f"a list of {word} names expected", f"it is {glimpse(listed)}")
        for name in listed:
            if not isinstance(name, str) or name not in flags:
                _bad(where, "flags expected to name tensors of the checkpoint", f"they name {glimpse(name)}")
            if name in named:
                _bad(where, "flags expected to name a tensor once", f"they name {glimpse(name)} twice")
            named.add(name)
            flags[name] = flag
    if meaning[default] is not None and not compact.get(FLAG_WORDS[None]):
        return flags  # type: ignore[return-value]  # none of them is None
    return {name: flag for name, flag in flags.items() if flag is not None}


def _parse_module_flags(lists: object, where: str) -> dict[str, bool] | None:
    if lists is None:
        return None
    if not isinstance(lists, dict):
        _bad(where, "module_flags expected to be an object", f"it is {glimpse(lists)}")
    flags: dict[str, bool] = {}
    for flag, word in MODULE_FLAG_WORDS.items():
        listed = lists.get(word)
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            _bad(where, f"module_flags expected to list {word} names", f"it has {glimpse(listed)}")
        before = len(flags)
        flags.update(dict.fromkeys(listed, flag))
        if len(flags) != before + len(listed):
            _bad(where, "module_flags expected to name a parameter once", f"one of {glimpse(listed)} appears twice")
    return flags


def _parse_superseded(value: object, where: str) -> Superseded | None:
    if value is None:
        return None
    if not isinstance(value, dict) or type(value.get("size")) is not int or type(value.get("mtime_ns")) is not int:
        _bad(where, "supersedes expected to have size and mtime_ns", f"it is {glimpse(value)}")
    return Superseded(value["size"], value["mtime_ns"])


def _parse_moment(members: dict[str, Any], where: str) -> Moment:
    step, epoch, metrics = members.get("step"), members.get("epoch"), members.get("metrics", {})
    ranks, created = members.get("ranks"), members.get("created")
    if step is not None and (type(step) is not int or step < 0):
        _bad(where, "step expected to be a number of steps", f"it is {glimpse(step)}")
    if epoch is not None and type(epoch) not in (int, float):
        _bad(where, "epoch expected to be a number", f"it is {glimpse(epoch)}")
    if not isinstance(metrics, dict):
        _bad(where, "metrics expected to map names to numbers", f"it is {glimpse(metrics)}")
    for name, value in metrics.items():
        if type(value) not in (int, float) and not (isinstance(value, str) and value in NOT_FINITE):
            _bad(where, f"metric {glimpse(name)} expected to be a number", f"it is {glimpse(value)}")
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        _bad(where, "ranks expected to be a number of processes", f"it is {glimpse(ranks)}")
    if created is not None and (not isinstance(created, str) or not _TIME.fullmatch(created)):
        _bad(where, "created expected to be a time in UTC", f"it is {glimpse(created)}")
    numbers = {name: NOT_FINITE[value] if isinstance(value, str) else value for name, value in metrics.items()}
    return Moment(step, epoch, numbers, ranks, created)


def _check_count(files: Sized, where: str) -> None:
    if len(files) > MAX_SHARDS:
        _bad(where, f"at most {MAX_SHARDS} files expected", f"it names {len(files)}")


def _check_file_name(name: str, where: str) -> None:
    if not is_file_name(name):
        _bad(where, "file names of one path component expected", f"it names {glimpse(name)}")


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: {wanted}, {found}; no shard was opened")
