"""The functions that are fuzzed. Our parsers may only accept, or raise one of our errors; safetensors' own reader gets the same bytes.
Whatever that refuses, ours must refuse; if both accept, the results must be equal.

The native parser of tables has a fuzzer of its own, ``fuzz_tables.cpp``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field

import safetensors
import torch

import shardsave
from shardsave._format.crc64 import crc64
from shardsave._format.header import CHECKSUM_KEY, _read_any, _read_compact, parse_header
from shardsave._format.index import Index, encode_index, ties_in_metadata
from shardsave._format.index_parsing import parse_index
from shardsave._storage.second_opinion import SecondOpinion
from shardsave._storage.shard_files import read_header

Tensors = dict[str, tuple[str, list[int], bytes]]

#: The largest amount of data that is added to a header whose offsets need data.
DATA_BYTES = 4096

#: Refusals by which our reader is stricter than safetensors, each with the reason.
STRICTER = (
    "keys expected once",  # it is unclear which of the two counts
    "JSON that begins with '{' expected",  # required by the format
    "only spaces expected after the JSON",  # required by the format
    "to have a dtype that torch has",
    "to have dtype, shape and data_offsets",  # no other keys, and no list in place of the object
    "__metadata__ expected to be an object",  # safetensors accepts null
    "to have an even last dimension",
    "to have a shape of sizes below 2^63",  # for an empty tensor: sizes in torch are signed
    "to have fewer than 2^63 elements",  # for an empty tensor: torch computes strides
    f"{CHECKSUM_KEY} expected to have",  # only shardsave knows this key
    "numbers of at most",
)


@dataclass
class Tally:
    """Counts the results of all inputs. `refusals` counts by line of the parser, which shows how far the fuzzer gets."""

    cases: int = 0
    accepted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.cases} cases, {self.accepted} accepted, refused in {len(self.refusals)} places"


class Disagreement(AssertionError):
    """Our reader and another differ on an input."""


headers, indexes = Tally(), Tally()


def fuzz_header(content: bytes) -> None:
    """Checks ``content`` as a whole file, and then its header alone with matching length and data."""
    check_shard(content)
    text = content[8:].rstrip(b"\0") or content
    check_shard(len(text).to_bytes(8, "little") + text + bytes(_wanted_data(text)))


def _wanted_data(text: bytes) -> int:
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(0, min(int(max(ends, default=0)), DATA_BYTES))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return 0


def check_shard(content: bytes) -> None:
    """Compares our reader with safetensors' own."""
    headers.cases += 1
    reference = _read_by_safetensors(content)
    with open(_memory, "wb", closefd=False) as file:
        file.truncate(0)
        file.seek(0)
        file.write(content)
    try:
        raw = read_header(_memory, len(content), "shard")
        parsed = parse_header(raw, len(content), "shard")
    except (shardsave.CorruptCheckpointError, shardsave.IncompatibleCheckpointError) as refusal:
        headers.refusals[_place(refusal)] += 1
        if not isinstance(reference, str) and not any(reason in str(refusal) for reason in STRICTER):
            raise Disagreement(f"refuses what safetensors accepts: {refusal}: {content!r}") from None
        return
    headers.accepted += 1
    compact = _read_compact(raw[8:])
    if compact is not None and [*map(list, compact[1])] != [*map(list, _read_any(raw[8:], "shard")[1])]:
        raise Disagreement(f"is read in two ways: {content!r}")
    if isinstance(reference, str):
        raise Disagreement(f"accepts what safetensors refuses ({reference}): {content!r}")
    tensors = {
        name: (dtype, list(shape), content[parsed.data_start + begin : parsed.data_start + begin + nbytes])
        for name, dtype, shape, begin, nbytes in zip(*parsed.tensors)
    }
    opinion = SecondOpinion()
    opinion.check(raw, len(content), parsed, "shard")
    if opinion.notes:
        raise Disagreement(f"has no second opinion ({opinion.notes}): {content!r}")
    if tensors != reference:
        raise Disagreement(f"reads {tensors}, safetensors {reference}: {content!r}")
    loaded = shardsave.load(f"/proc/self/fd/{_memory}", verify=False)
    expected = {name: raw for name, (_, _, raw) in reference.items()}
    expected.update((name, expected[stored]) for name, stored in ties_in_metadata(parsed.metadata, reference).items())
    if {name: _bytes(tensor) for name, tensor in loaded.items()} != expected:
        raise Disagreement(f"loads other bytes than safetensors: {content!r}")


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_by_safetensors(content: bytes) -> Tensors | str:
    """What safetensors reads from ``content``, or its refusal."""
    try:
        tensors = safetensors.deserialize(content)
    except safetensors.SafetensorError as refusal:
        return str(refusal)
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in tensors}


def fuzz_index(content: bytes) -> None:
    """Checks ``content`` unchanged, and with a valid checksum."""
    check_index(content)
    at = content.rfind(b', "crc64nvme"')
    if at >= 0:
        body = content[:at] + b', "crc64nvme": "'
        check_index(body + f"{crc64(body):016x}".encode() + b'"}}\n')


def check_index(content: bytes) -> None:
    """Compares our parser with the JSON parser of safetensors, and its result with the rules of FORMAT.md."""
    indexes.cases += 1
    try:
        index = parse_index(content, "index")
    except (shardsave.CorruptCheckpointError, shardsave.IncompatibleCheckpointError) as refusal:
        indexes.refusals[_place(refusal)] += 1
        return
    indexes.accepted += 1
    refusal_of_json = _refusal_of_json(content)
    if refusal_of_json is not None and "recursion limit" not in refusal_of_json:
        raise Disagreement(f"accepts JSON that safetensors refuses ({refusal_of_json}): {content!r}")
    if not _is_consistent(index):
        raise Disagreement(f"makes an index that contradicts itself: {index}: {content!r}")


def _refusal_of_json(content: bytes) -> str | None:
    """How safetensors refuses ``content`` inside a header, at a place where it parses any JSON and ignores the value."""
    start = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"any":'
    refusal = _read_by_safetensors((len(start) + len(content) + 2).to_bytes(8, "little") + start + content + b"}}")
    return refusal if isinstance(refusal, str) else None


def _is_consistent(index: Index) -> bool:
    files = set(index.weight_map.values())
    if any(name in ("", ".", "..") or "/" in name or "\0" in name for name in files):
        return False
    record = index.record
    if record is None:
        return True
    names = index.weight_map.keys() | record.ties.keys()
    return (
        files <= record.shards.keys()
        and all(stored in index.weight_map and name not in index.weight_map for name, stored in record.ties.items())
        and (record.flags is None or record.flags.keys() <= names)
        and all(
            8 <= shard.header_length <= shard.length and 0 <= shard.header_crc < 1 << 64 for shard in record.shards.values()
        )
        and parse_index(encode_index(index), "index") == index
    )


def _place(refusal: BaseException) -> str:
    """The line of the parser that refused the input."""
    place, step = "", (refusal.__context__ or refusal).__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_name
        if name not in ("_bad", "_constant"):
            place = f"{name}:{step.tb_lineno}"
        step = step.tb_next
    return place


_memory = os.memfd_create("fuzz", os.MFD_CLOEXEC)
