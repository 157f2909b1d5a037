"""A shard's header: from tensors to bytes and back, with every way in which it can be bad.

The safetensors format: eight bytes little-endian header length, JSON, data. Ours begins its data at a multiple of 4096.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from operator import attrgetter
from typing import NamedTuple, NoReturn

from shardsave._dtypes import BY_NAME
from shardsave._files import read_at
from shardsave._json import NotJSON, glimpse, parse_object
from shardsave._plan import ALIGNMENT, Shard
from shardsave.errors import CorruptCheckpointError

#: The longest JSON that safetensors' own reader takes, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: The key of `__metadata__` that holds sixteen hex digits for each tensor, in data order.
CHECKSUM_KEY = "shardsave.crc64nvme"

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HEX = re.compile(r"(?:[0-9a-f]{16})*")


class HeaderTensor(NamedTuple):
    """A tensor of a header; ``begin`` and ``end`` are bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: ``tensors`` in data order, ``sums`` one for each, or None where the file has none of ours."""

    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]
    data_start: int
    sums: tuple[int, ...] | None


_BEFORE_SUMS = f'{{"__metadata__":{{"format":"pt","{CHECKSUM_KEY}":"'


def encode_header(shard: Shard, more: Mapping[str, str] | None = None) -> bytes:
    """The whole start of a file, up to its data, with zeros where `with_sums` puts the checksums; a pure function of the tensors.

    ``more``: further entries of ``__metadata__``, which no shard of a checkpoint has.
    """
    told = "".join(f",{encode_basestring(key)}:{encode_basestring(value)}" for key, value in (more or {}).items())
    parts = [f'{_BEFORE_SUMS}{"0" * 16 * len(shard.tensors)}"{told}}}']
    for (name, dtype, sizes, nbytes, _), begin in zip(shard.tensors, shard.begins):
        shape = ",".join(map(str, sizes))
        parts.append(
            f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{begin + nbytes}]}}'
        )
    text = (",".join(parts) + "}").encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    if padded > MAX_HEADER_BYTES:
        raise ValueError(
            f"a shard of {len(shard.tensors)} tensors needs a header of {padded} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; choose a smaller max_shard_size"
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)


def with_sums(header: bytes, sums: Sequence[int]) -> bytes:
    """``header`` with the checksums of all its tensors, in data order."""
    digits = b"".join(b"%016x" % value for value in sums)
    start = 8 + len(_BEFORE_SUMS)
    return header[:start] + digits + header[start + len(digits) :]


def read_header(fd: int, file_length: int, where: str) -> bytes:
    """The bytes of the header of the file behind ``fd``, for `parse_header`. Allocates no more than the file is long.

    Raises CallFailed.
    """
    start = read_start(fd, 8)
    return start + read_at(fd, _header_length(start, file_length, where), 8)


def read_start(fd: int, length: int) -> bytes:
    """The first ``length`` bytes of the file behind ``fd``, fewer where it is shorter."""
    return read_at(fd, length, 0)


def _header_length(start: bytes, file_length: int, where: str) -> int:
    if len(start) < 8:
        _bad(where, "8 bytes of header length expected", f"the file ends after {len(start)}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        _bad(where, f"at most {MAX_HEADER_BYTES} bytes of header expected", f"it says {length}, as no safetensors file does")
    if length > file_length - 8:
        _bad(where, f"{length} bytes of header expected", f"the file has {file_length - 8} after its length")
    return length


def parse_header(data: bytes, file_length: int, where: str) -> Header:
    """Checks ``data``, the length and the JSON of a header, for a file of ``file_length`` bytes.

    Raises CorruptCheckpointError; every reason to refuse a header is in this function and those that it calls.
    """
    length = _header_length(data, file_length, where)
    if len(data) != 8 + length:
        _bad(where, f"{length} bytes of header expected", f"{len(data) - 8} are there")
    if data[8:9] != b"{":
        _bad(where, "JSON that begins with '{' expected", f"it begins with {data[8:9]!r}" if length else "it is empty")
    try:
        entries = parse_object(data[8:])
    except NotJSON as refusal:
        _bad(where, refusal.wanted, refusal.found)
    if data.rstrip(b" ")[-1:] != b"}":
        _bad(where, "only spaces expected after the JSON", f"there is {data.rstrip(b' ')[-1:]!r}")
    metadata = _check_metadata(entries.pop("__metadata__", {}), where)
    tensors = sorted((_check_tensor(name, entry, where) for name, entry in entries.items()), key=attrgetter("begin", "end"))
    end = 0
    for tensor in tensors:
        if tensor.begin != end:
            kind = "overlap" if tensor.begin < end else "hole"
            what = f"tensor {glimpse(tensor.name)}"
            _bad(where, f"{what} expected to begin at {end}", f"it begins at {tensor.begin} ({kind})")
        end = tensor.end
    if file_length - 8 - length != end:
        _bad(where, f"{end} bytes of data expected", f"the file has {file_length - 8 - length}")
    return Header(tuple(tensors), metadata, 8 + length, _check_sums(metadata, len(tensors), where))


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        _bad(where, "__metadata__ expected to be an object", f"it is {glimpse(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _bad(where, f"__metadata__ entry {glimpse(key)} expected to be a string", f"it is {glimpse(value)}")
    return metadata


def _check_tensor(name: str, entry: object, where: str) -> HeaderTensor:
    """Checks one entry of a header. 100,000 of them may come, so words are made for what is refused alone."""

    def bad(wanted: str, found: str) -> NoReturn:
        _bad(where, f"tensor {glimpse(name)}{wanted}", found)

    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        bad(" expected to have dtype, shape and data_offsets", f"it is {glimpse(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    row = BY_NAME.get(dtype) if type(dtype) is str else None
    if row is None:
        bad(" expected to have a known dtype", f"it has {glimpse(dtype)}")
    if type(shape) is not list or not all(map(_is_size, shape)):
        bad(" expected to have a shape of sizes below 2^63", f"it has {glimpse(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        bad(" expected to have two data_offsets below 2^63", f"it has {glimpse(offsets)}")
    elements = strides = 1
    for size in shape:
        elements *= size
        strides *= size or 1  # torch counts the strides of an empty tensor as if its zeros were ones
        if strides >= 1 << 63:
            bad(" expected to have fewer than 2^63 elements", f"its shape is {glimpse(shape)}")
    bits = elements * row.bits
    if row.bits < 8 and (bits % 8 or not shape or shape[-1] % 2):
        bad(f" of {dtype} expected to have an even last dimension", f"its shape is {glimpse(shape)}")
    begin, end = offsets
    if end - begin != bits // 8:
        bad(f" of {dtype} and shape {glimpse(shape)} expected to have {bits // 8} bytes", f"it has {end - begin}")
    return HeaderTensor(sys.intern(name), dtype, tuple(shape), begin, end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_sums(metadata: Mapping[str, str], count: int, where: str) -> tuple[int, ...] | None:
    digits = metadata.get(CHECKSUM_KEY)
    if digits is None:
        return None
    if len(digits) != 16 * count or not _HEX.fullmatch(digits):
        found = f"it has {len(digits)} characters, {glimpse(digits)}"
        _bad(where, f"{CHECKSUM_KEY} expected to have {count} × 16 lower-case hex digits", found)
    raw = bytes.fromhex(digits)
    return struct.unpack(f">{count}Q", raw)


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: header: {wanted}, {found}; nothing else was read from it")
