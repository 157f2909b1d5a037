"""Method: pickles of a few kilobytes, made to take all memory or all time, are converted. None of them comes from a file of torch."""

from __future__ import annotations

import pickle
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardsave
from shardsave._foreign import unpickling
from shardsave._foreign.dcp import read_distributed


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def get(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def doubled(first: bytes, pair: bytes, levels: int = 60) -> bytes:
    """A key that has the last one twice on each level; each level is one opcode."""
    return first + b"\x94" + b"".join(b"0" + pair.replace(b"?", get(level)) + b"\x94" for level in range(levels))


def file_with(path: Path, pickled: bytes, *, packed: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", (b"" if pickled.startswith(b"\x80") else b"\x80\x04") + pickled + b".")
    return path


MANY = b"(" + b"".join(b"J" + struct.pack("<i", number) for number in range(20_000)) + b"t\x94"
TUPLES, SETS = doubled(b")", b"??\x86"), doubled(b"(\x91", b"(??\x85\x91")
KEYS = {
    "a tuple": b"}" + TUPLES + b"K\1s", "several keys": b"}(" + TUPLES + b"K\1u", "pairs in a dict": b"(" + TUPLES + b"K\1d",
    "a frozenset": b"}" + SETS + b"K\1s", "an element": b"\x8f(" + TUPLES + b"\x90" + b"0}" + get(60) + b"K\1s",
    "pairs of a mapping": name("collections", "OrderedDict") + b"](" + TUPLES + b"K\1\x86e\x85R",
    "a long number": b"}\x8b" + struct.pack("<i", 5000) + b"\1" * 5000 + b"K\1s",
}  # fmt: skip
COPIES = {
    "records of one tuple": name("numpy", "x") + get(0) + b"R", "sets": name("builtins", "set") + get(1) + b"\x85R",
    "mappings": name("collections", "Counter") + get(2) + b"\x85R",
    "new objects": name("numpy", "x") + get(0) + b"\x81", "new objects with keywords": name("numpy", "x") + get(0) + b"}\x92",
    "old objects": b"(" + get(0) + b"inumpy\nx\n", "old objects, by class": b"(" + name("numpy", "x") + get(0) + b"o",
    "mappings of pairs": name("collections", "OrderedDict") + get(3) + b"\x85R",
}  # fmt: skip
OBJECTS = {"lists": b"]", "marks": b"(", "mappings": b"}", "remembered": b"N\x94", "tuples": b"N\x85", "sets": b"\x8f"}


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small bound for the objects, and an address space in which a failed test does not stop the machine."""
    monkeypatch.setattr(unpickling, "MAX_OBJECT_BYTES", 16 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path, words: str) -> None:
    with pytest.raises(shardsave.CorruptCheckpointError, match=words):
        shardsave.convert(path, path.with_name("out"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", KEYS)
def test_keys_without_an_end(tmp_path: Path, case: str) -> None:
    """Catches a key whose hash takes years (in C, so that Ctrl-C does not end it), or whose text takes all memory."""
    refused(file_with(tmp_path / "x.pt", KEYS[case]), "a key")


@pytest.mark.parametrize("case", COPIES)
def test_copies_of_one_container(tmp_path: Path, case: str) -> None:
    """Catches five bytes of a pickle that copy a container of any length, as often as the file wants."""
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", number) + b"N\x86" for number in range(20_000)) + b"e\x94"
    mapping = b"}(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(20_000)) + b"u\x94"
    lists = b"](" + b"".join(b"J" + struct.pack("<i", number) for number in range(20_000)) + b"e\x94"
    made = MANY + b"0" + lists + b"0" + mapping + b"0" + pairs + b"0](" + COPIES[case] * 500 + b"e"
    refused(file_with(tmp_path / "x.pt", made), "16.8 MB of memory")


@pytest.mark.parametrize("case", OBJECTS)
def test_objects_of_one_byte(tmp_path: Path, case: str) -> None:
    """Catches opcodes of one byte that take a hundred bytes of memory each."""
    refused(file_with(tmp_path / "x.pt", OBJECTS[case] * 400_000), "16.8 MB of memory")


def test_a_packed_pickle(tmp_path: Path) -> None:
    """Catches 80 kB that become a pickle of 80 MB."""
    refused(file_with(tmp_path / "x.pt", b"N0" * 40_000_000 + b"N", packed=True), "at most 64000000 bytes")


def test_very_many_names(tmp_path: Path) -> None:
    """Catches a class for each of a million names."""
    names = b"".join(name("numpy", f"n{number}") for number in range(11_000))
    refused(file_with(tmp_path / "x.pt", b"](" + names + b"e"), "10000 different names")


def test_attributes_of_a_mapping(tmp_path: Path) -> None:
    """Catches a mapping whose pickle replaces its methods: its tensors were hidden, or the conversion failed with a TypeError."""
    for maker in (name("numpy", "x"), name("collections", "OrderedDict")):
        mapping = name("collections", "OrderedDict") + b")R" + text("a") + b"K\1s"
        mapping += b"}(" + text("items") + maker + text("_metadata") + b"}ub"
        file_with(tmp_path / "x.pt", mapping)
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"it has 'a' \(int\)"):
            shardsave.convert(tmp_path / "x.pt", tmp_path / "out")


def test_honest_sets_and_keys(tmp_path: Path) -> None:
    """Catches a set, a number or a pair as a key, or a mapping of pairs, that is refused together with the hostile ones."""
    content = {"s": {1, 2}, "f": frozenset([(1, 2)]), 3: 1, (4, 5): 2, None: 3, 2.5: {b"k": 1}, frozenset([1]): 4}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        file_with(tmp_path / "x.pt", pickle.dumps(content, protocol=protocol)[:-1])
        with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"'s' \(list\), 'f' \(list\), '3' \(int\), '\(4, 5\)'"):
            shardsave.convert(tmp_path / "x.pt", tmp_path / "out")
    pairs = name("collections", "OrderedDict") + b"](" + text("a") + b"K\1\x86e\x85R"  # as Python 2 wrote it
    with pytest.raises(shardsave.IncompatibleCheckpointError, match=r"it has 'a' \(int\)"):
        shardsave.convert(file_with(tmp_path / "x.pt", pairs), tmp_path / "out")


@pytest.mark.timeout(60)
def test_a_table_with_such_values(tmp_path: Path) -> None:
    """Catches a table of a distributed checkpoint whose values do not end as text, or are no keys: an error of Python itself."""
    metadata = "torch.distributed.checkpoint.metadata"
    endless = b"]" + b"\x94" + b"".join(b"0](" + get(level) * 2 + b"e\x94" for level in range(60))
    number = b"\x8b" + struct.pack("<i", 5000) + b"\1" * 5000
    for fqn, offset in ((endless, b"N"), (text("a"), endless), (text("a"), number + b"\x85"), (b"]", b"N"), (b"}", b"N")):
        index = name(metadata, "MetadataIndex") + b")\x81}(" + text("fqn") + fqn + text("offset") + offset + b"ub"
        place = name("torch.distributed.checkpoint.filesystem", "_StorageInfo") + b")\x81"
        table = name(metadata, "Metadata") + b")\x81}(" + text("state_dict_metadata") + b"}"
        table += text("storage_data") + b"}" + index + place + b"s" + b"ub."
        (tmp_path / ".metadata").write_bytes(b"\x80\x04" + table)
        with pytest.raises(shardsave.CorruptCheckpointError, match="expected"):
            read_distributed(str(tmp_path))
