"""The header of a shard: written from tensors, read back from bytes. Every reason to refuse a header is in this file.

The safetensors format: the header's length in eight little-endian bytes, JSON, data. shardsave aligns the data to 4096 bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from json.encoder import encode_basestring
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

from shardsave._common.strict_json import Buffer, NotJSON, glimpse, is_counted, is_wide, parse_object
from shardsave._format.dtypes import BY_NAME, NOT_IN_TORCH
from shardsave._format.packing import ALIGNMENT, Shard
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

#: The longest JSON that safetensors' own reader accepts, in bytes.
MAX_HEADER_BYTES = 100_000_000

#: The key of `__metadata__` whose value has sixteen hex digits for each tensor, in data order.
CHECKSUM_KEY = "shardsave.crc64nvme"

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HEX = re.compile(r"(?:[0-9a-f]{16})*")


class Tensors(NamedTuple):
    """The tensors of a header in data order, one column for each property. ``begins`` counts bytes from the start of the data."""

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    begins: Sequence[int]
    nbytes: Sequence[int]


class Header(NamedTuple):
    """A checked header. ``sums`` has a checksum for each tensor; it is None if shardsave did not write the file."""

    tensors: Tensors
    metadata: Mapping[str, str]
    data_start: int
    sums: tuple[int, ...] | None


_BEFORE_SUMS = f'{{"__metadata__":{{"format":"pt","{CHECKSUM_KEY}":"'


def encode_header(shard: Shard, more: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file before its data, with zeros in place of the checksums; `with_sums` fills them in.

    They depend on the tensors alone. ``more``: further entries of ``__metadata__`` for a file that is no shard of a checkpoint.
    """
    entries = "".join(f",{encode_basestring(key)}:{encode_basestring(value)}" for key, value in (more or {}).items())
    before = f'{_BEFORE_SUMS}{"0" * 16 * len(shard.tensors)}"{entries}}}'
    shapes = {sizes: ",".join(map(str, sizes)) for sizes in {tensor.shape for tensor in shard.tensors}}
    tensors = [
        f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{shapes[sizes]}],"data_offsets":[{begin},{begin + nbytes}]}}'
        for (name, dtype, sizes, nbytes, _), begin in zip(shard.tensors, shard.begins)
    ]
    text = (",".join([before, *tensors]) + "}").encode()
    padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    if padded > MAX_HEADER_BYTES:
        raise ValueError(
            f"one file of {len(shard.tensors)} tensors needs a header of {padded} bytes, the format allows {MAX_HEADER_BYTES}; "
            f"a directory of shards has no such limit"
        )
    return padded.to_bytes(8, "little") + text.ljust(padded)


def with_sums(header: bytes, sums: Sequence[int]) -> bytes:
    """``header`` with the checksums of all its tensors, in data order."""
    digits = struct.pack(f">{len(sums)}Q", *sums).hex().encode()
    start = 8 + len(_BEFORE_SUMS)
    return header[:start] + digits + header[start + len(digits) :]


def header_length(start: bytes, file_length: int, where: str) -> int:
    """The length of a header's JSON, read from ``start``, the first bytes of a file. Raises CorruptCheckpointError.

    It is never longer than the rest of the file, so a reader may allocate that much.
    """
    if len(start) < 8:
        _bad(where, "8 bytes of header length expected", f"the file ends after {len(start)}")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        _bad(where, f"at most {MAX_HEADER_BYTES} bytes of header expected", f"it says {length}, as no safetensors file does")
    if length > file_length - 8:
        _bad(where, f"{length} bytes of header expected", f"the file has {file_length - 8} after its length")
    return length


def parse_header(data: bytes, file_length: int, where: str) -> Header:
    """Checks a header: ``data`` is its length and its JSON, ``file_length`` the size of the file in bytes.

    Raises CorruptCheckpointError; IncompatibleCheckpointError if torch has no place for a tensor.
    """
    length = header_length(data, file_length, where)
    if len(data) != 8 + length:
        _bad(where, f"{length} bytes of header expected", f"{len(data) - 8} are there")
    if data[8:9] != b"{":
        _bad(where, "JSON that begins with '{' expected", f"it begins with {data[8:9]!r}" if length else "it is empty")
    content = memoryview(data)[8:]
    metadata, tensors = _read_compact(content) or _read_any(content, where)
    end = tensors.begins[-1] + tensors.nbytes[-1] if tensors.names else 0
    if file_length - 8 - length != end:
        _bad(where, f"{end} bytes of data expected", f"the file has {file_length - 8 - length}")
    return Header(tensors, metadata, 8 + length, _check_sums(metadata, len(tensors.names), where))


#: Matches one tensor of a header in the usual form; the groups are its name, its kind (everything but the offsets), begin and end.
#: If there is none, it matches all remaining text, and the last group is the first character of that.
_TENSOR = re.compile(
    r' ?"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)": ?'
    r'(\{"dtype": ?"[A-Z0-9_]+", ?"shape": ?\[[0-9, ]*\], ?)"data_offsets": ?\[([0-9]{1,18}), ?([0-9]{1,18})\]\}'
    r"(?:,|\}\Z)|(.).*",
    re.DOTALL,
)
_METADATA = re.compile(r'\{"__metadata__": ?\{')
_BEFORE_TENSORS = re.compile(r'\}, ?(?=")')

#: How many characters of a header are taken apart at a time: as objects they take some five times the memory.
_STEP = 1 << 20

#: How many kinds of tensors are remembered. A usual file has far fewer.
_MOST_KINDS = 10_000


def _read_compact(content: Buffer) -> tuple[dict[str, str], Tensors] | None:
    """Reads a header in the form of shardsave, safetensors or `json.dumps`, four times as fast as `_read_any`; else returns None.

    Never refuses a header: if there is any doubt it returns None, and `_read_any` decides. Each kind of tensor is checked once.
    """
    if is_counted(content) and is_wide(content):  # here its text and its strings would be in memory three times
        return None
    try:
        text = str(content, "utf-8").rstrip(" ")
        metadata, position = _split_metadata(text)
        tensors = _read_tensors(text, position)
    except (UnicodeDecodeError, NotJSON, CorruptCheckpointError, IncompatibleCheckpointError):
        return None
    if tensors is None or len({"__metadata__", *tensors.names}) != len(tensors.names) + 1:
        return None
    return metadata, tensors


def _split_metadata(text: str) -> tuple[dict[str, str], int]:
    """The metadata at the beginning of a header, and where its tensors begin. Raises NotJSON, CorruptCheckpointError."""
    found = _METADATA.match(text)
    if found is None:
        return {}, 1
    after = _BEFORE_TENSORS.search(text, found.end())
    if after is None:
        return {}, 1
    return _check_metadata(parse_object(text[found.end() - 1 : after.start() + 1].encode()), ""), after.end()


def _read_tensors(text: str, position: int) -> Tensors | None:
    """The tensors of a header from ``position`` on, or None if they are not in the usual form, or not in data order without holes."""
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    checked: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    while position < len(text):
        cut = text.find("]},", position + _STEP)
        until = cut + 3 if cut >= 0 else len(text)
        rows = _TENSOR.findall(text, position, until)
        if rows[-1][-1]:
            return None
        names, kinds, begins, ends, _ = zip(*rows)
        if len(checked) > _MOST_KINDS:
            checked.clear()
        for kind in set(kinds) - checked.keys():
            checked[kind] = _check_kind(parse_object(f'{kind}"data_offsets":[]}}'.encode()), "", "")
        dtypes, shapes, nbytes = zip(*map(checked.__getitem__, kinds))
        bounds = list(accumulate(nbytes, initial=end))
        if [*begins, ends[-1]] != [*map(str, bounds)] or ends[:-1] != begins[1:]:
            return None
        if "\\" in text[position:until]:
            names = tuple(_unescaped(name) if "\\" in name else name for name in names)
        end = bounds.pop()
        for column, values in zip(columns, (names, dtypes, shapes, bounds, nbytes)):
            column.extend(values)
        position = until
    return Tensors(*columns) if text.endswith("]}}") else None


def _unescaped(name: str) -> str:
    return next(iter(parse_object(f'{{"{name}":0}}'.encode())))


def _read_any(content: Buffer, where: str) -> tuple[dict[str, str], Tensors]:
    """The metadata and the tensors of any header; entries may be in any order, and the JSON may have any form."""
    try:
        entries = parse_object(content)
    except NotJSON as refusal:
        _bad(where, refusal.wanted, refusal.found)
    if (last := bytes(content).rstrip(b" ")[-1:]) != b"}":
        _bad(where, "only spaces expected after the JSON", f"there is {last!r}")
    metadata = _check_metadata(entries.pop("__metadata__", {}), where)
    rows = [(*_check_tensor(name, entry, where), name) for name, entry in entries.items()]
    rows.sort(key=itemgetter(0, 1))
    end = 0
    for begin, stop, *_, name in rows:
        if begin != end:
            kind = "overlap" if begin < end else "hole"
            _bad(where, f"tensor {glimpse(name)} expected to begin at {end}", f"it begins at {begin} ({kind})")
        end = stop
    begins, _, dtypes, shapes, nbytes, names = zip(*rows) if rows else ((),) * 6
    return metadata, Tensors(names, dtypes, shapes, begins, nbytes)


def _check_metadata(metadata: object, where: str) -> dict[str, str]:
    if metadata is None:  # some writers have this, and safetensors reads it
        return {}
    if not isinstance(metadata, dict):
        _bad(where, "__metadata__ expected to be an object", f"it is {glimpse(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _bad(where, f"__metadata__ entry {glimpse(key)} expected to be a string", f"it is {glimpse(value)}")
    return metadata


def _check_tensor(name: str, entry: object, where: str) -> tuple[int, int, str, tuple[int, ...], int]:
    """Checks one entry of a header; returns its begin, its end, its dtype, its shape and its size in bytes."""
    dtype, shape, nbytes = _check_kind(entry, name, where)
    assert isinstance(entry, dict)
    offsets = entry["data_offsets"]
    if type(offsets) is not list or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _bad_tensor(where, name, " expected to have two data_offsets below 2^63", f"it has {glimpse(offsets)}")
    begin, end = offsets
    if end - begin != nbytes:
        _bad_tensor(
            where, name, f" of {dtype} and shape {glimpse([*shape])} expected to have {nbytes} bytes", f"it has {end - begin}"
        )
    return begin, end, dtype, shape, nbytes


def _check_kind(entry: object, name: str, where: str) -> tuple[str, tuple[int, ...], int]:
    """Checks a tensor's entry without its offsets; returns its dtype, its shape and the bytes that these need."""
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        _bad_tensor(where, name, " expected to have dtype, shape and data_offsets", f"it is {glimpse(entry)}")
    dtype, shape = entry["dtype"], entry["shape"]
    known = BY_NAME.get(dtype) if type(dtype) is str else None
    if dtype in NOT_IN_TORCH:
        _refuse_tensor(where, name, " expected to have a dtype that torch has", f"it has {dtype}")
    if known is None:
        _bad_tensor(where, name, " expected to have a known dtype", f"it has {glimpse(dtype)}")
    if type(shape) is not list or not all(map(_is_size, shape)):
        _bad_tensor(where, name, " expected to have a shape of sizes below 2^63", f"it has {glimpse(shape)}")
    elements = strides = 1
    for size in shape:
        elements *= size
        strides *= size or 1  # torch computes the strides of an empty tensor as if its zeros were ones
        if strides >= 1 << 63:
            _bad_tensor(where, name, " expected to have fewer than 2^63 elements", f"its shape is {glimpse(shape)}")
    bits = elements * known.bits
    if known.bits < 8 and (bits % 8 or not shape or shape[-1] % 2):
        refuse = (
            _bad_tensor if bits % 8 else _refuse_tensor
        )  # torch has two elements in one byte, safetensors any number of bytes
        refuse(where, name, f" of {dtype} expected to have an even last dimension", f"its shape is {glimpse(shape)}")
    return dtype, tuple(shape), bits // 8


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_sums(metadata: Mapping[str, str], count: int, where: str) -> tuple[int, ...] | None:
    digits = metadata.get(CHECKSUM_KEY)
    if digits is None:
        return None
    if len(digits) != 16 * count or not _HEX.fullmatch(digits):
        expectation = f"{CHECKSUM_KEY} expected to have {count} × 16 lower-case hex digits"
        _bad(where, expectation, f"it has {len(digits)} characters, {glimpse(digits)}")
    raw = bytes.fromhex(digits)
    return struct.unpack(f">{count}Q", raw)


def _refuse_tensor(where: str, name: str, wanted: str, found: str) -> NoReturn:
    """Raises the error for a tensor that is sound, but that torch has no place for."""
    raise IncompatibleCheckpointError(
        f"cannot read {where}: header: tensor {glimpse(name)}{wanted}, {found}; the file is as it was"
    )


def _bad_tensor(where: str, name: str, wanted: str, found: str) -> NoReturn:
    _bad(where, f"tensor {glimpse(name)}{wanted}", found)


def _bad(where: str, wanted: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(f"corrupt {where}: header: {wanted}, {found}; nothing else was read from it")
