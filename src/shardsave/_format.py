"""A shard's header: from tensors to bytes and back, with every way in which it can be bad.

The safetensors format: eight bytes little-endian header length, JSON, data. Ours begins its data at a multiple of 4096.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import NoReturn

from shardsave._dtypes import BY_NAME
from shardsave._files import call
from shardsave._json import NotJSON, glimpse, parse_object
from shardsave._plan import ALIGNMENT, Shard
from shardsave.errors import CorruptCheckpointError

#: The longest JSON that safetensors' own reader takes, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: The key of `__metadata__` that holds sixteen hex digits for each tensor, in data order.
CHECKSUM_KEY = "shardsave.crc64nvme"

_HEX = re.compile(r"(?:[0-9a-f]{16})*")


@dataclass(frozen=True, slots=True)
class HeaderTensor:
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


def encode_header(shard: Shard, sums: Sequence[int] | None = None) -> bytes:
    """The whole start of a file, up to its data; a pure function of the tensors and their checksums.

    Without ``sums`` zeros stand in their place: the length is the same.
    """
    digits = "".join(f"{value:016x}" for value in sums) if sums is not None else "0" * 16 * len(shard.tensors)
    parts = [f'"__metadata__":{{"format":"pt","{CHECKSUM_KEY}":"{digits}"}}']
    quote = encode_basestring
    for tensor, begin in zip(shard.tensors, shard.begins):
        shape = ",".join(map(str, tensor.shape))
        end = begin + tensor.nbytes
        parts.append(f'{quote(tensor.name)}:{{"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}')
    text = ("{" + ",".join(parts) + "}").encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    if padded > MAX_HEADER_BYTES:
        raise ValueError(
            f"a shard of {len(shard.tensors)} tensors needs a header of {padded} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; choose a smaller max_shard_size"
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)


def read_header(fd: int, file_length: int, where: str) -> bytes:
    """The bytes of the header of the file behind ``fd``, for `parse_header`. Allocates no more than the file is long.

    Raises CallFailed.
    """
    start = read_start(fd, 8)
    return start + _pread(fd, _header_length(start, file_length, where), 8)


def read_start(fd: int, length: int) -> bytes:
    """The first ``length`` bytes of the file behind ``fd``, fewer where it is shorter."""
    return _pread(fd, length, 0)


def _pread(fd: int, length: int, offset: int) -> bytes:
    parts = []
    while length > 0 and (part := call(os.pread, "", fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


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
    tensors = sorted((_check_tensor(name, entry, where) for name, entry in entries.items()), key=_place)
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


def _place(tensor: HeaderTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        _bad(where, "__metadata__ expected to be an object", f"it is {glimpse(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _bad(where, f"__metadata__ entry {glimpse(key)} expected to be a string", f"it is {glimpse(value)}")
    return metadata


def _check_tensor(name: str, entry: object, where: str) -> HeaderTensor:
    what = f"tensor {glimpse(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _bad(where, f"{what} expected to have dtype, shape and data_offsets", f"it is {glimpse(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    row = BY_NAME.get(dtype) if isinstance(dtype, str) else None
    if row is None:
        _bad(where, f"{what} expected to have a known dtype", f"it has {glimpse(dtype)}")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        _bad(where, f"{what} expected to have a shape of sizes below 2^63", f"it has {glimpse(shape)}")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(at) is int and 0 <= at < 1 << 63 for at in offsets):
        _bad(where, f"{what} expected to have two data_offsets below 2^63", f"it has {glimpse(offsets)}")
    elements = strides = 1
    for size in shape:
        elements *= size
        strides *= size or 1  # torch counts the strides of an empty tensor as if its zeros were ones
        if strides >= 1 << 63:
            _bad(where, f"{what} expected to have fewer than 2^63 elements", f"its shape is {glimpse(shape)}")
    bits = elements * row.bits
    if row.bits < 8 and (bits % 8 or not shape or shape[-1] % 2):
        _bad(where, f"{what} of {dtype} expected to have an even last dimension", f"its shape is {glimpse(shape)}")
    begin, end = offsets
    if end - begin != bits // 8:
        _bad(where, f"{what} of {dtype} and shape {glimpse(shape)} expected to have {bits // 8} bytes", f"it has {end - begin}")
    return HeaderTensor(sys.intern(name), dtype, tuple(shape), begin, end)


def _check_sums(metadata: Mapping[str, str], count: int, where: str) -> tuple[int, ...] | None:
    digits = metadata.get(CHECKSUM_KEY)
    if digits is None:
        return None
    if len(digits) != 16 * count or not _HEX.fullmatch(digits):
        found = f"it has {len(digits)} characters, {glimpse(digits)}"
        _bad(where, f"{CHECKSUM_KEY} expected to have {count} × 16 lower-case hex digits", found)
    raw = bytes.fromhex(digits)
    return tuple(int.from_bytes(raw[at : at + 8], "big") for at in range(0, len(raw), 8))


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: header: {wanted}, {found}; nothing else was read from it")
