"""Attacks on an index: bytes that are no index, indexes as other libraries write them, and shardsave's record, changed and resealed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tampering import FIRST, INDEX, Case, Json, edit_index, edit_text, foreign, read_index, rewrite, saved, seal

import shardsave


def refused(refusal: str) -> str:
    return f"corrupt index {INDEX}: {refusal}; no shard was opened"


def raw(name: str, refusal: str, content: bytes) -> Case:
    """An index with this content."""

    def make(folder: Path) -> None:
        saved(folder)
        rewrite(folder / INDEX, content)

    return Case(name, refused(refusal), make)


def others(name: str, refusal: str, weight_map: object = None, **top: object) -> Case:
    """An index without shardsave's record, with two good shards."""
    return Case(name, refused(refusal), lambda folder: foreign(folder, weight_map, **top))


def record(name: str, refusal: str, change: Callable[[Json], object]) -> Case:
    """Applies ``change`` to shardsave's record and reseals the index."""
    return whole(name, refusal, lambda index: change(index["shardsave"]))


def whole(name: str, refusal: str, change: Callable[[Json], object]) -> Case:
    """Applies ``change`` to the whole index and reseals it."""

    def make(folder: Path) -> None:
        saved(folder)
        edit_index(folder, change)

    return Case(name, refused(refusal), make)


def text(name: str, refusal: str, old: str, new: str) -> Case:
    """Replaces a part of the text of the index and reseals it."""

    def make(folder: Path) -> None:
        saved(folder)
        edit_text(folder, old, new)

    return Case(name, refused(refusal), make)


def content(name: str, refusal: str, change: Callable[[bytes], bytes]) -> Case:
    """Changes the bytes of the index without resealing it."""

    def make(folder: Path) -> None:
        saved(folder)
        rewrite(folder / INDEX, change((folder / INDEX).read_bytes()))

    return Case(name, refused(refusal), make)


def under_the_seal(folder: Path) -> None:
    """Changes a byte under the seal. The writer is named 'test', so that the checksum in the message does not depend on our version."""
    saved(folder)
    edit_index(folder, lambda index: index["shardsave"].update(writer="test"))
    sealed = (folder / INDEX).read_bytes()
    rewrite(folder / INDEX, sealed.replace(b'"durable": false', b'"durable": true '))


def flags(name: str, refusal: str, value: object) -> Case:
    return record(name, refusal, lambda ours: ours.update(flags=value))


def module_flags(name: str, refusal: str, value: object) -> Case:
    return record(name, refusal, lambda ours: ours.update(module_flags=value))


def beside(name: str, refusal: str, value: object) -> Case:
    return record(name, refusal, lambda ours: ours.update(companions=value))


def shard(name: str, refusal: str, value: object) -> Case:
    """Replaces the record of the first shard."""
    return record(name, f"shard {FIRST} expected to have {refusal}", lambda ours: ours["shards"].update({FIRST: value}))


def file_name(name: str, glimpse: str, value: str) -> Case:
    refusal = f"file names of one path component expected, it names {glimpse}"
    return others(name, refusal, {"x": "a.safetensors", "y": value})


def over_the_bound(folder: Path) -> None:
    saved(folder)
    os.truncate(folder / INDEX, 100_000_001)


def another_seal(folder: Path) -> None:
    """The checksum of the record is correct, but is not its last member."""
    saved(folder)
    sealed = seal(json.dumps(read_index(folder)))[:-3]
    rewrite(folder / INDEX, sealed + b', "z": "0000000000000000"}}\n')


def newer(folder: Path) -> None:
    saved(folder)
    edit_index(folder, lambda index: index["shardsave"].update(requires=["pieces", "deltas"]))


def with_directory(ours: Json) -> None:
    """Adds a part that has a directory of its own."""
    ours["parts"] = {"training state": ["training-0123abcd/index.json", 9, 9, CRC]}


def in_directory(name: str, refusal: str, file: str) -> Case:
    """A part that has the file ``file``, in an index that says that parts have directories."""
    return record(
        name, refusal, lambda ours: ours.update(requires=["part directories"], parts={"training state": [file, 9, 9, CRC]})
    )


def moment(name: str, refusal: str, **members: object) -> Case:
    return record(name, refusal, lambda ours: ours.update(members))


def of_record(key: str, value: Any) -> Callable[[Json], object]:
    return lambda ours: ours.update({key: value})


SEAL = "the record's checksum expected at the very end, it is not there; the file was cut or changed"
ONE_PART = "file names of one path component expected, it names "
COMPANION = "companion config.json expected to have length and checksum, it has "
MEMBERS = "the record expected to have durable, flags, metadata, shards, supersedes, ties, it lacks "
FLAGS = "flags expected to have a default of frozen, trainable, none, they are "
PARTS = "length, header length and checksum, it has "
INSIDE = "a header inside of it, it has "
CRC = "0000000000000000"

INDEXES = [
    # Bytes.
    raw("index is empty", "JSON expected, it is empty", b""),
    raw("index of zeros", "JSON expected, it is broken at character 0", bytes(100)),
    raw("index cut short", "JSON expected, it ends in the middle, after 14 characters", b'{"weight_map":'),
    raw("index is no JSON", "JSON expected, it is broken at character 0", b"PK\3\4"),
    raw("index is a list", "a JSON object expected, it is []", b"[]"),
    raw("index with a byte order mark", "JSON expected, it begins with a byte order mark", b'\xef\xbb\xbf{"weight_map":{}}'),
    raw("index in UTF-16", "UTF-8 expected, byte 0 is 0xff", '{"weight_map":{}}'.encode("utf-16")),
    raw("index that goes deep", "JSON expected, it is nested too deeply", b'{"a":' * 100_000),
    raw("index with deep lists", "JSON expected, it is nested too deeply", b'{"a":' + b"[" * 1_000_000),
    raw("index with NaN", "JSON expected, NaN is no JSON value", b'{"metadata":{"total_size":NaN},"weight_map":{}}'),
    raw("index with a huge exponent", "finite numbers expected, there is -1e400", b'{"a":-1e400,"weight_map":{}}'),
    raw("index with a number of 100,000 digits",
        "numbers of at most 308 digits expected, one has 100000", b'{"a":' + b"1" * 100_000 + b',"weight_map":{}}'),
    raw("half of a surrogate pair deep in the index",
        "text in Unicode expected, it has half of a surrogate pair, '\\udc00'", b'{"a":[[{"b":["\\udc00"]}]],"weight_map":{}}'),
    raw("index with weight_map twice", "keys expected once, 'weight_map' appears twice", b'{"weight_map":{},"weight_map":{}}'),
    raw("index with a name twice", "keys expected once, 'x' appears twice", b'{"weight_map":{"x":"a","x":"b"}}'),
    raw("two indexes in one file", "JSON expected, something follows it, at character 17", b'{"weight_map":{}}{}'),
    Case("index over the bound",
         f"corrupt index {INDEX}: at most 100000000 bytes expected, it has 100000001; no shard was opened", over_the_bound),
    # weight_map.
    raw("weight_map missing", "weight_map expected to map names to files, it is null", b'{"metadata":{}}'),
    others("more files than a save numbers", "at most 99999 files expected, it names 100000", {f"t{n}": f"{n}" for n in range(100_000)}),
    others("weight_map is a list", "weight_map expected to map names to files, it is ['x']", ["x"]),
    others("weight_map leads to a number", "weight_map expected to map 'x' to a file, it has 1", {"x": 1}),
    others("weight_map leads to a list", "weight_map expected to map 'x' to a file, it has ['a.safetensors']",
           {"x": ["a.safetensors"]}),
    file_name("file above the directory", "'../b.safetensors'", "../b.safetensors"),
    file_name("file of the directory itself", "'.'", "."),
    file_name("file is the directory above", "'..'", ".."),
    file_name("absolute path", "'/etc/passwd'", "/etc/passwd"),
    file_name("file in a subdirectory", "'sub/b.safetensors'", "sub/b.safetensors"),
    file_name("file without a name", "''", ""),
    file_name("NUL in a file name", "'b\\x00.safetensors'", "b\0.safetensors"),
    file_name("escape codes in a file name", "'\\x1b[2Jb.safetensors'", "\x1b[2Jb.safetensors"),
    file_name("file name that no file system has", "'" + "é" * 37 + "..." + "é" * 38 + "'", "é" * 128),
    raw("half of a surrogate pair in a file name",
        "text in Unicode expected, it has half of a surrogate pair, '\\ud800'", b'{"weight_map":{"x":"\\ud800"}}'),
    # The seal.
    Case("byte changed under the seal",
         refused("checksum b3cde7d9cae46718 expected, it has 1c1a9a79cc283133; the file was changed after it was saved"), under_the_seal),
    content("index cut by one byte", SEAL, lambda data: data[:-1]),
    content("byte after the seal", SEAL, lambda data: data + b"\n"),
    content("seal with a letter too many", SEAL, lambda data: data[:-4] + b"0" + data[-4:]),
    content("seal that is no hex", SEAL, lambda data: data[:-20] + b"\\u0030bcdef01234" + data[-4:]),
    content("seal missing", SEAL, lambda data: data[: data.rindex(b', "crc64nvme"')] + b"}}\n"),
    Case("seal not at the end", refused(SEAL), another_seal),
    raw("record is null", SEAL, b'{"weight_map": {}, "shardsave": null}\n'),
    raw("record is a number", SEAL, b'{"weight_map": {}, "shardsave": 1}\n'),
    raw("seal is a number", SEAL, b'{"weight_map": {}, "shardsave": {"crc64nvme": 1234567890123456}}\n'),
    # The record.
    Case("record requires what we do not know",
         f"cannot read index {INDEX}: this version of shardsave knows ['part directories'], it requires ['deltas', 'pieces']; "
         "the checkpoint is intact, read it with a newer version", newer, shardsave.IncompatibleCheckpointError),
    record("part in a directory, which nothing requires",
           "file names of one path component expected, it names 'training-0123abcd/index.json'", with_directory),
    record("requires missing", "requires expected to be a list of features, it is null", lambda ours: ours.pop("requires")),
    record("requires is text", "requires expected to be a list of features, it is 'pieces'", of_record("requires", "pieces")),
    record("requires a number", "requires expected to be a list of features, it is [1]", of_record("requires", [1])),
    record("durable missing", MEMBERS + "durable", lambda ours: ours.pop("durable")),
    record("flags missing", MEMBERS + "flags", lambda ours: ours.pop("flags")),
    record("ties and shards missing", MEMBERS + "shards, ties", lambda ours: (ours.pop("ties"), ours.pop("shards"))),
    record("durable is a number", "durable expected to be true or false, it is 1", of_record("durable", 1)),
    record("metadata is a list", "metadata expected to be an object, it is []", of_record("metadata", [])),
    record("supersedes is a number", "supersedes expected to have size and mtime_ns, it is 5", of_record("supersedes", 5)),
    record("supersedes is true for a size", "supersedes expected to have size and mtime_ns, it is {'mtime_ns': 1, 'size': True}",
           of_record("supersedes", {"size": True, "mtime_ns": 1})),
    whole("total_size is negative", "total_size expected to be a number of bytes, it is -1",
          lambda index: index["metadata"].update(total_size=-1)),
    whole("total_size is true", "total_size expected to be a number of bytes, it is true",
          lambda index: index["metadata"].update(total_size=True)),
    text("total_size of 700 digits", "numbers of at most 308 digits expected, one has 700",
         '"total_size": 56', '"total_size": ' + "7" * 700),
    text("member of the record twice", "keys expected once, 'durable' appears twice",
         '"durable": false', '"durable": false, "durable": true'),
    text("user metadata that goes deep", "JSON expected, it is nested too deeply", '"run": "7"', '"run": ' + "[" * 50_000),
    # Ties.
    record("ties is a list", "ties expected to map names to names, it is []", of_record("ties", [])),
    record("tie to nowhere", "tie 'tied.weight' expected to lead to a stored tensor, it leads to 'no.weight'",
           of_record("ties", {"tied.weight": "no.weight"})),
    record("tie to a list", "tie 'tied.weight' expected to lead to a stored tensor, it leads to ['top.weight']",
           of_record("ties", {"tied.weight": ["top.weight"]})),
    record("tie that is stored", "tie 'top.bias' expected not to be stored itself, weight_map has it too",
           of_record("ties", {"top.bias": "top.weight"})),
    record("tie to a tie", "tie 'b' expected to lead to a stored tensor, it leads to 'a'",
           of_record("ties", {"a": "top.weight", "b": "a"})),
    record("ties in a circle", "tie 'a' expected to lead to a stored tensor, it leads to 'b'",
           of_record("ties", {"a": "b", "b": "a"})),
    # Flags.
    flags("flags is a list", FLAGS + "[]", []),
    flags("flags without a default", FLAGS + "{'frozen': []}", {"frozen": []}),
    flags("default of flags is a list", FLAGS + "{'default': ['frozen']}", {"default": ["frozen"]}),
    flags("default of flags is true", FLAGS + "{'default': True}", {"default": True}),
    flags("default of flags is unknown", FLAGS + "{'default': 'melted'}", {"default": "melted"}),
    flags("flags of a number", "a list of frozen names expected, it is 5", {"default": "none", "frozen": 5}),
    flags("flags of one name", "a list of frozen names expected, it is 'top.bias'", {"default": "none", "frozen": "top.bias"}),
    flags("flag of an unknown tensor", "flags expected to name tensors of the checkpoint, they name 'no.weight'",
          {"default": "trainable", "frozen": ["no.weight"]}),
    flags("flag of a list", "flags expected to name tensors of the checkpoint, they name ['top.bias']",
          {"default": "trainable", "frozen": [["top.bias"]]}),
    flags("one name frozen and trainable", "flags expected to name a tensor once, they name 'top.bias' twice",
          {"default": "none", "frozen": ["top.bias"], "trainable": ["top.bias"]}),
    flags("one name frozen twice", "flags expected to name a tensor once, they name 'top.bias' twice",
          {"default": "none", "frozen": ["top.bias", "top.bias"]}),
    # Flags by the names in the module.
    module_flags("module_flags is a list", "module_flags expected to be an object, it is []", []),
    module_flags("no list of trainable names", "module_flags expected to list trainable names, it has null", {"frozen": []}),
    module_flags("a frozen name is a number", "module_flags expected to list frozen names, it has [5]", {"frozen": [5]}),
    module_flags("a name of the module twice", "module_flags expected to name a parameter once, one of ['a'] appears twice",
                 {"frozen": ["a"], "trainable": ["a"]}),
    # Parts.
    record("parts is a list", "parts expected to be an object, it is []", lambda ours: ours.update(parts=[])),
    record("part without a file", "part 'program' expected to begin with the name of its file, it has [5]",
           lambda ours: ours.update(parts={"program": [5]})),
    in_directory("directory above", ONE_PART + "'..'", "../index.json"),
    in_directory("directory without a name", ONE_PART + "''", "/index.json"),
    in_directory("directory in a directory", ONE_PART + "'a/training-0123abcd'", "a/training-0123abcd/index.json"),
    in_directory("directory by an absolute path", ONE_PART + "'/training-0123abcd'", "/training-0123abcd/index.json"),
    in_directory("directory with an escape code", ONE_PART + "'\\x1b[2J'", "\x1b[2J/index.json"),
    in_directory("another file in a directory", ONE_PART + "'training-0123abcd/other.json'", "training-0123abcd/other.json"),
    in_directory("training state without a directory",
                 "part 'training state' expected to have a directory of its own, it is training-0123abcd.json", "training-0123abcd.json"),
    record("tensors in a directory", ONE_PART + "'training-0123abcd/index.json'",
           lambda ours: ours.update(requires=["part directories"],
                                    shards=ours["shards"] | {"training-0123abcd/index.json": [8, 8, CRC]})),
    # The shards that were taken over.
    record("shared is an object", "shared expected to list shards, it has {'x': 1}", lambda ours: ours.update(shared={"x": 1})),
    record("shared has a number", "shared expected to list shards, it has [1]", lambda ours: ours.update(shared=[1])),
    record("shared has another file", "shared expected to list shards, it has ['config.json']",
           lambda ours: ours.update(shared=["config.json"])),
    # The moment of a training.
    moment("step is true", "step expected to be a number of steps, it is true", step=True),
    moment("step is negative", "step expected to be a number of steps, it is -1", step=-1),
    moment("epoch is text", "epoch expected to be a number, it is '3'", epoch="3"),
    moment("metrics is a list", "metrics expected to map names to numbers, it is [1]", metrics=[1]),
    moment("metric is text", "metric 'loss' expected to be a number, it is '1.0'", metrics={"loss": "1.0"}),
    moment("metric is a list", "metric 'loss' expected to be a number, it is [1]", metrics={"loss": [1]}),
    moment("metric is true", "metric 'loss' expected to be a number, it is true", metrics={"loss": True}),
    moment("ranks is zero", "ranks expected to be a number of processes, it is 0", ranks=0),
    moment("created is a number", "created expected to be a time in UTC, it is 5", created=5),
    moment("created in local time", "created expected to be a time in UTC, it is '2026-11-30T05:40:00+01:00'",
           created="2026-11-30T05:40:00+01:00"),
    moment("created in another script", "created expected to be a time in UTC, it is '٢٠٢٦-11-30T05:40:00Z'",
           created="٢٠٢٦-11-30T05:40:00Z"),
    # Files beside the weights.
    beside("companions is a list", "companions expected to be an object, it is []", []),
    beside("companion above", "file names of one path component expected, it names '../config.json'", {"../config.json": [2, CRC]}),
    beside("companion is a number", COMPANION + "5", {"config.json": 5}),
    beside("companion without a checksum", COMPANION + "[2]", {"config.json": [2]}),
    beside("companion's checksum in upper case", COMPANION + "[2, 'ABCDEF0123456789']", {"config.json": [2, "ABCDEF0123456789"]}),
    beside("companion's length is negative", COMPANION + f"[-2, '{CRC}']", {"config.json": [-2, CRC]}),
    # Shards.
    record("shards is a list", "shards expected to be an object, it is []", of_record("shards", [])),
    record("no record of a shard", f"a record of shard {FIRST} expected, there is none", lambda ours: ours["shards"].pop(FIRST)),
    record("record of a shard above", "file names of one path component expected, it names '../x'",
           lambda ours: ours["shards"].update({"../x": [8, 8, CRC]})),
    shard("shard is a number", PARTS + "5", 5),
    shard("shard with two numbers", PARTS + "[4120, 4096]", [4120, 4096]),
    shard("shard's length is true", PARTS + f"[True, 8, '{CRC}']", [True, 8, CRC]),
    shard("shard's length is a fraction", PARTS + f"[4120.0, 4096, '{CRC}']", [4120.0, 4096, CRC]),
    shard("shard's checksum is a number", PARTS + "[4120, 4096, 0]", [4120, 4096, 0]),
    shard("shard's checksum in upper case", PARTS + "[4120, 4096, 'ABCDEF0123456789']", [4120, 4096, "ABCDEF0123456789"]),
    shard("shard's checksum with a line feed", PARTS + f"[4120, 4096, '{CRC}\\n']", [4120, 4096, CRC + "\n"]),
    shard("shard's length is negative", INSIDE + f"[-1, 4096, '{CRC}']", [-1, 4096, CRC]),
    shard("shard's header is negative", INSIDE + f"[4120, -8, '{CRC}']", [4120, -8, CRC]),
    shard("shard's header longer than the shard", INSIDE + f"[4096, 4104, '{CRC}']", [4096, 4104, CRC]),
    shard("shard's header over the bound", INSIDE + f"[1099511627776, 100000009, '{CRC}']", [1 << 40, 100_000_009, CRC]),
    shard("shard's header of 2^64 bytes", INSIDE + f"[36893488147419103232, 18446744073709551616, '{CRC}']", [1 << 65, 1 << 64, CRC]),
]  # fmt: skip
