"""The training state's directory: its document, the documents of ranks, and the reasons to refuse them.

What a document says of the training itself (``shared`` and ``leaves``) passes through: `shardsave._training` writes and reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave._format.boxes import BOXES
from shardsave._format.file_names import RANK_DOCUMENT, RANK_TENSORS
from shardsave._format.index import ShardRecord, encode_shard
from shardsave._format.index_parsing import parse_shard
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

_FORMAT, _RANK_FORMAT = "shardsave-training", "shardsave-training-rank"
_VERSION = 1

#: The features that this version knows.
_FEATURES = (BOXES,)
_SHARED = b', "shared": '


class TrainingIndex(NamedTuple):
    """What the document of a training state says of its files: ``files`` has a record for each other file of the directory.

    ``requires``: the features that a reader of the directory must know.
    """

    ranks: int
    files: Mapping[str, ShardRecord]
    requires: tuple[str, ...] = ()


def encode_training_index(shared: bytes, index: TrainingIndex) -> bytes:
    """The document of a training state. ``shared``: the values that all ranks have in common, as JSON."""
    members = {
        "format": _FORMAT,
        "version": _VERSION,
        "requires": [*index.requires],
        "ranks": index.ranks,
        "files": {name: encode_shard(record) for name, record in index.files.items()},
    }
    return json.dumps(members).encode()[:-1] + _SHARED + shared + b"}"


def encode_rank_document(rank: int, leaves: bytes) -> bytes:
    """The document of one rank. ``leaves``: its own values, a JSON object."""
    members = {"format": _RANK_FORMAT, "version": _VERSION, "requires": [], "rank": rank}
    return json.dumps(members).encode()[:-1] + b', "leaves": ' + leaves + b"}"


def parse_training_index(data: bytes, where: str) -> tuple[TrainingIndex, dict[str, Any]]:
    """Checks the document of a training state; returns what it says of its files, and all of its members.

    Raises CorruptCheckpointError, or IncompatibleCheckpointError if it requires a feature that this version does not know.
    """
    members = _parse_document(data, _FORMAT, where)
    ranks, files = members.get("ranks"), members.get("files")
    if type(ranks) is not int or ranks < 1:
        _bad(where, "ranks expected to be a number of processes", f"it is {glimpse(ranks)}")
    if not isinstance(files, dict):
        _bad(where, "files expected to be an object", f"it is {glimpse(files)}")
    for name in files:
        match = RANK_DOCUMENT.fullmatch(name) or RANK_TENSORS.fullmatch(name)
        if match is None or int(match[1]) >= ranks:
            _bad(where, f"files of {ranks} ranks expected", f"it names {glimpse(name)}")
    records = {name: parse_shard(f"file {name}", entry, where) for name, entry in files.items()}
    if "shared" not in members:
        _bad(where, "shared values expected", "there are none")
    return TrainingIndex(ranks, records, tuple(members["requires"])), members


def parse_training_files(data: bytes, where: str) -> Mapping[str, ShardRecord]:
    """`TrainingIndex.files` of the document ``data``. The values behind them, which may be long, are not parsed if they come last."""
    before, begin, _ = data.partition(_SHARED)
    with suppress(CorruptCheckpointError):
        return parse_training_index(before + begin + b"null}", where)[0].files
    return parse_training_index(data, where)[0].files


def parse_rank_document(data: bytes, rank: int, where: str) -> dict[str, Any]:
    """Checks the document of ``rank``; returns its members. Raises as `parse_training_index`."""
    members = _parse_document(data, _RANK_FORMAT, where)
    if type(members.get("rank")) is not int or members["rank"] != rank:
        _bad(where, f"rank {rank} expected", f"it is {glimpse(members.get('rank'))}")
    if not isinstance(members.get("leaves"), dict):
        _bad(where, "leaves expected to be an object", f"it is {glimpse(members.get('leaves'))}")
    return members


def _parse_document(data: bytes, expected: str, where: str) -> dict[str, Any]:
    try:
        members = parse_object(data)
    except NotJSON as refusal:
        _bad(where, refusal.wanted, refusal.found)
    if members.get("format") != expected:
        _bad(where, f"format {expected} expected", f"it is {glimpse(members.get('format'))}")
    requires = members.get("requires")
    is_known = type(requires) is list and all(feature in _FEATURES for feature in requires)
    if not is_known or members.get("version") != _VERSION:
        raise IncompatibleCheckpointError(
            f"cannot read {where}: it is of version {glimpse(members.get('version'))} and requires {glimpse(requires)}, "
            f"which this version of shardsave does not know; the checkpoint is intact, read it with a newer version"
        )
    return members


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: {wanted}, {found}; nothing else of the training state was read")
