"""Attacks on a header. Each is one file, ``model.safetensors``, with a name, the refusal that is expected, and its content."""

from __future__ import annotations

import os
from pathlib import Path

from tampering import KEY, LONE, Case, entry, shard_bytes

import shardsave

X = entry()
FOUR = b"\0" * 4


def lone(name: str, refusal: str, header: str | bytes, data: bytes = FOUR, length: int | None = None) -> Case:
    """A file with this header and data. ``refusal``: the part of the message between *header:* and the state of things."""
    return raw(name, refusal, shard_bytes(header, data, length))


def no_place(name: str, refusal: str, tensor: str, data: bytes) -> Case:
    """A file that safetensors reads, with a tensor that torch has no place for."""
    message = f"cannot read shard {LONE}: header: {refusal}; the file is as it was"
    content = shard_bytes(f'{{"x":{tensor}}}', data)
    return Case(
        name, message, lambda folder: ((folder / LONE).write_bytes(content), None)[1], shardsave.IncompatibleCheckpointError
    )


def raw(name: str, refusal: str, content: bytes) -> Case:
    """A file with this content."""

    def make(folder: Path) -> None:
        (folder / LONE).write_bytes(content)

    return Case(name, f"corrupt shard {LONE}: header: {refusal}; nothing else was read from it", make)


def sparse(name: str, refusal: str, start: bytes, size: int) -> Case:
    """A file that begins with ``start`` and is then grown to ``size`` bytes."""

    def make(folder: Path) -> None:
        (folder / LONE).write_bytes(start)
        os.truncate(folder / LONE, size)

    return Case(name, f"corrupt shard {LONE}: header: {refusal}; nothing else was read from it", make)


def tensor(name: str, refusal: str, dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> Case:
    """A header with one tensor, 'x'."""
    return lone(name, f"tensor 'x' expected to {refusal}", f'{{"x":{entry(dtype, shape, offsets)}}}')  # type: ignore[arg-type]


def checksums(name: str, found: str, digits: str) -> Case:
    """A header with one tensor, and these digits under shardsave's key for checksums."""
    refusal = f"{KEY} expected to have 1 × 16 lower-case hex digits, it has {found}"
    return lone(name, refusal, f'{{"__metadata__":{{"{KEY}":"{digits}"}},"x":{X}}}')


def too_long(length: int) -> str:
    return f"at most 100000000 bytes of header expected, it says {length}, as no safetensors file does"


SHAPE = "have a shape of sizes below 2^63, it has "
OFFSETS = "have two data_offsets below 2^63, it has "
DTYPE = "have a known dtype, it has "
MANY = "have fewer than 2^63 elements, its shape is "
EVEN = "of F4 expected to have an even last dimension, its shape is "
TWICE = "keys expected once, "
ENTRY = "tensor 'x' expected to have dtype, shape and data_offsets, it is "

HEADERS = [
    # The length word.
    raw("file cut in the length", "8 bytes of header length expected, the file ends after 5", b"\x10\0\0\0\0"),
    raw("file cut after the length", "16 bytes of header expected, the file has 0 after its length", b"\x10" + bytes(7)),
    raw("file cut in the header", "70 bytes of header expected, the file has 2 after its length", shard_bytes('{"', length=70)),
    raw("file of zeros", "JSON that begins with '{' expected, it is empty", bytes(4096)),
    lone("header of 2^63 bytes", too_long(9223372036854775808), "{}", length=1 << 63),
    lone("header of 2^64-1 bytes", too_long(18446744073709551615), "{}", length=2**64 - 1),
    lone("header larger than the file", "99 bytes of header expected, the file has 6 after its length", "{}", length=99),
    sparse(
        "header over the bound, and the file as large",
        too_long(100000001),
        shard_bytes("{", length=100_000_001),
        1 << 40,
    ),
    sparse(
        "largest header, of zeros",
        "JSON that begins with '{' expected, it begins with b'\\x00'",
        (100_000_000).to_bytes(8, "little"),
        100_000_008,
    ),
    # The JSON.
    lone("not beginning with a brace", "JSON that begins with '{' expected, it begins with b' '", " {}", b""),
    lone("byte order mark", "JSON that begins with '{' expected, it begins with b'\\xef'", b"\xef\xbb\xbf{}", b""),
    lone("a list", "JSON that begins with '{' expected, it begins with b'['", "[]", b""),
    lone("JSON cut short", "JSON expected, it ends in the middle, after 5 characters", '{"x":', b""),
    lone("text cut short", "JSON expected, it ends in the middle, after 3 characters", '{"x', b""),
    lone("no JSON", "JSON expected, it is broken at character 1", "{dtype}", b""),
    lone("zeros behind the JSON", "JSON expected, something follows it, at character 2", b"{}\0\0", b""),
    lone("second object behind the JSON", "JSON expected, something follows it, at character 2", "{}{}", b""),
    lone("line feed behind the JSON", "only spaces expected after the JSON, there is b'\\n'", "{}\n", b""),
    lone("bad UTF-8", "UTF-8 expected, byte 2 is 0xff", b'{"\xff":1}', b""),
    lone("surrogate as UTF-8", "UTF-8 expected, byte 2 is 0xed", b'{"\xed\xa0\x80":1}', b""),
    lone("overlong UTF-8", "UTF-8 expected, byte 2 is 0xc0", b'{"\xc0\xaf":1}', b""),
    lone("half of a surrogate pair in a name", "text in Unicode expected, it has half of a surrogate pair, '\\ud800'",
         f'{{"\\ud800":{X}}}'),
    lone("half of a surrogate pair in metadata", "text in Unicode expected, it has half of a surrogate pair, '\\udfff'",
         '{"__metadata__":{"a":"\\udfff"}}', b""),
    lone("control character in a name", "JSON expected, it is broken at character 2", b'{"\n":1}', b""),
    lone("deep lists", "JSON expected, it is nested too deeply", '{"x":' + "[" * 100_000, b""),
    lone("deep objects", "JSON expected, it is nested too deeply", '{"x":' * 100_000, b""),
    lone(
        "a great many values",
        "JSON that takes at most 800000000 bytes of memory expected, it may take 1057000415",
        '{"x":[' + "[]," * 7_000_000 + "0]}",
        b"",
    ),
    lone("NaN", "JSON expected, NaN is no JSON value", f'{{"x":{X},"y":NaN}}'),
    lone("Infinity", "JSON expected, -Infinity is no JSON value", f'{{"x":{X},"y":-Infinity}}'),
    lone("huge exponent", "finite numbers expected, there is 1e999", f'{{"x":{X},"y":1e999}}'),
    lone("number of 5000 digits", "numbers of at most 308 digits expected, one has 5000", f'{{"x":{"9" * 5000}}}'),
    lone("tensor twice", TWICE + "'x' appears twice", f'{{"x":{X},"x":{X}}}'),
    lone("tensor twice, once escaped", TWICE + "'x' appears twice", f'{{"x":{X},"\\u0078":{X}}}'),
    lone("key of a tensor twice", TWICE + "'dtype' appears twice", f'{{"x":{X[:-1]},"dtype":"F32"}}}}'),
    lone("__metadata__ twice", TWICE + "'__metadata__' appears twice", f'{{"__metadata__":{{}},"x":{X},"__metadata__":{{}}}}'),
    lone("key of __metadata__ twice", TWICE + "'format' appears twice",
         f'{{"__metadata__":{{"format":"pt","format":"np"}},"x":{X}}}'),
    # __metadata__.
    lone("tensor named __metadata__", "__metadata__ entry 'shape' expected to be a string, it is [1]", f'{{"__metadata__":{X}}}'),
    lone("__metadata__ of a list", "__metadata__ expected to be an object, it is []", f'{{"__metadata__":[],"x":{X}}}'),
    lone("number in __metadata__", "__metadata__ entry 'n' expected to be a string, it is 1",
         f'{{"__metadata__":{{"n":1}},"x":{X}}}'),
    checksums("checksums too short", "15 characters, '000000000000000'", "0" * 15),
    checksums("checksums too long",
              "32 characters, '00000000000000000000000000000000'", "0" * 32),
    checksums("checksums missing", "0 characters, ''", ""),
    checksums("checksums in upper case", "16 characters, 'AE8B14860A799888'", "AE8B14860A799888"),
    checksums("checksums not hex", "16 characters, '000000000000000g'", "000000000000000g"),
    # A tensor's entry.
    lone("tensor is a list", ENTRY + "[]", '{"x":[]}', b""),
    lone("tensor without offsets", ENTRY + "{'dtype': 'F32', 'shape': [1]}", '{"x":{"dtype":"F32","shape":[1]}}', b""),
    lone("tensor with another key",
         ENTRY + "{'data_offsets': [0, 4], 'dtype': 'F32', 'order': 'C', 'shape': [1]}", f'{{"x":{X[:-1]},"order":"C"}}}}'),
    lone("name of a million characters",
         "tensor '" + "n" * 37 + "..." + "n" * 38 + "' expected to have dtype, shape and data_offsets, it is 5",
         '{"' + "n" * 1_000_000 + '":5}', b""),
    tensor("unknown dtype", DTYPE + "'F31'", dtype="F31"),
    tensor("dtype in lower case", DTYPE + "'f32'", dtype="f32"),
    tensor("dtype of null", DTYPE + "null", dtype=None),
    tensor("dtype is a list", DTYPE + "['F32']", dtype=["F32"]),
    tensor("negative size", SHAPE + "[-1]", shape=[-1]),
    lone("size of minus zero", "tensor 'x' expected to " + SHAPE + "[-0.0]",
         '{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""),
    tensor("fractional size", SHAPE + "[1.0]", shape=[1.0]),
    tensor("size is true", SHAPE + "[True]", shape=[True]),
    tensor("size is text", SHAPE + "['1']", shape=["1"]),
    tensor("size of 2^63", SHAPE + "[9223372036854775808]", shape=[1 << 63]),
    tensor("size of 300 digits", SHAPE + "[" + "1" + "0" * 37 + "..." + "0" * 39 + "]", shape=[10**299]),
    tensor("shape is a number", SHAPE + "1", shape=1),
    tensor("shape of null", SHAPE + "null", shape=None),
    tensor("elements past 2^63", MANY + "[4294967296, 4294967296]", shape=[1 << 32, 1 << 32]),
    tensor("elements past 2^64 that wrap to one", MANY + "[3037000500, 3037000500]", shape=[3037000500, 3037000500]),
    tensor("strides past 2^63 of an empty tensor",
           MANY + "[0, 4611686018427387904, 4611686018427387904]", shape=[0, 1 << 62, 1 << 62], offsets=(0, 0)),
    lone("bytes past 2^63", "tensor 'x' of F64 and shape [4611686018427387904] expected to have 36893488147419103232 bytes, it has 0",
         f'{{"x":{entry("F64", [1 << 62], (0, 0))}}}', b""),
    lone("shape of 100,000 sizes",
         "tensor 'x' of F32 and shape [1, 1, 1, 1, ...] expected to have 4 bytes, it has 8",
         f'{{"x":{entry(shape=[1] * 100_000, offsets=(0, 8))}}}', b"\0" * 8),
    tensor("negative offset", OFFSETS + "[-4, 0]", offsets=(-4, 0)),
    tensor("fractional offset", OFFSETS + "[0, 4.0]", offsets=(0, 4.0)),
    tensor("offset is false", OFFSETS + "[False, 4]", offsets=(False, 4)),
    tensor("offset of 2^63", OFFSETS + "[9223372036854775808, 9223372036854775812]", offsets=(1 << 63, (1 << 63) + 4)),
    tensor("one offset", OFFSETS + "[0]", offsets=[0]),
    tensor("three offsets", OFFSETS + "[0, 4, 8]", offsets=[0, 4, 8]),
    tensor("offsets are an object", OFFSETS + "{'a': 0, 'b': 4}", offsets={"a": 0, "b": 4}),
    lone("offsets the wrong way round", "tensor 'x' of F32 and shape [1] expected to have 4 bytes, it has -4",
         f'{{"x":{entry(offsets=(4, 0))}}}'),
    lone("fewer bytes than the shape", "tensor 'x' of F32 and shape [2] expected to have 8 bytes, it has 4",
         f'{{"x":{entry(shape=[2])}}}'),
    no_place("F4 with an odd last dimension", f"tensor 'x' {EVEN}[2, 3]", entry("F4", [2, 3], (0, 3)), b"\0" * 3),
    no_place("F4 in pairs of rows", f"tensor 'x' {EVEN}[4, 1]", entry("F4", [4, 1], (0, 2)), b"\0" * 2),
    no_place("F6", "tensor 'x' expected to have a dtype that torch has, it has F6_E2M3", entry("F6_E2M3", [4], (0, 3)), b"\0" * 3),
    lone("F4 with half a byte", f"tensor 'x' {EVEN}[1]", f'{{"x":{entry("F4", [1], (0, 1))}}}', b"\0"),
    lone("F4 without dimensions", f"tensor 'x' {EVEN}[]", f'{{"x":{entry("F4", [], (0, 1))}}}', b"\0"),
    # Places.
    lone("hole before the first tensor", "tensor 'x' expected to begin at 0, it begins at 4 (hole)",
         f'{{"x":{entry(offsets=(4, 8))}}}', b"\0" * 8),
    lone("hole between tensors", "tensor 'y' expected to begin at 4, it begins at 8 (hole)",
         f'{{"x":{X},"y":{entry(offsets=(8, 12))}}}', b"\0" * 12),
    lone("tensors that overlap", "tensor 'y' expected to begin at 4, it begins at 2 (overlap)",
         f'{{"x":{X},"y":{entry(offsets=(2, 6))}}}', b"\0" * 6),
    lone("tensors in the same place", "tensor 'y' expected to begin at 4, it begins at 0 (overlap)", f'{{"x":{X},"y":{X}}}'),
    lone("empty tensor inside another", "tensor 'y' expected to begin at 4, it begins at 2 (overlap)",
         f'{{"x":{X},"y":{entry(shape=[0], offsets=(2, 2))}}}'),
    lone("data cut", "4 bytes of data expected, the file has 3", f'{{"x":{X}}}', b"\0" * 3),
    lone("data after the last tensor", "4 bytes of data expected, the file has 5", f'{{"x":{X}}}', b"\0" * 5),
    lone("data without tensors", "0 bytes of data expected, the file has 1", "{}", b"\0"),
    lone("tensor of 2^62 bytes in a small file", "4611686018427387904 bytes of data expected, the file has 4",
         f'{{"x":{entry("U8", [1 << 62], (0, 1 << 62))}}}'),
]  # fmt: skip
