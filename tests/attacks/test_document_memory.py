"""Method: documents of half a megabyte, made to take as much memory as possible, are read while the interpreter's allocations are
traced. The bound on memory is lowered in proportion, so that they stand for documents of 100 MB, the longest that are read.
"""

from __future__ import annotations

import itertools
import json
import string
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tampering import INDEX
from torch import nn

import shardsave
from shardsave._architecture.document import Document
from shardsave._common import strict_json
from shardsave._format import header
from shardsave._format.crc64 import crc64
from shardsave._format.header import parse_header
from shardsave._format.index import END
from shardsave._format.index_parsing import parse_index
from shardsave._huggingface.transformers_config import read_config
from shardsave._program.program import ProgramDocument

LENGTH = 500_000

#: How many bytes of memory a document may take for each of its own.
RATIO = 10


READERS: dict[str, Callable[[bytes], object]] = {
    "header": lambda content: parse_header(content, len(content), "header"),
    "index": lambda content: parse_index(content, "index"),
    "architecture": lambda content: Document(content, "architecture"),
    "program": lambda content: ProgramDocument(content, "program", torch.device("cpu")),
}


def keys() -> Iterator[str]:
    """Every key, the shortest first."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase + string.digits, repeat=length))


def repeated(unit: str, before: str = "[", after: str = "]") -> Callable[[int], str]:
    """``unit`` again and again."""
    return lambda length: before + (unit + ",") * max(0, (length - 2) // (len(unit) + 1)) + unit + after


def keyed(value: str) -> Callable[[int], str]:
    """``value`` again and again, under keys of their own."""

    def make(length: int) -> str:
        members, total = [], 0
        for key in keys():
            members.append(f'"{key}":{value}')
            total += len(members[-1]) + 1
            if total >= length:
                return "{" + ",".join(members) + "}"
        raise AssertionError

    return make


#: Values, each of about so many characters, that take far more memory than text.
VALUES: dict[str, Callable[[int], str]] = {
    "empty arrays": repeated("[]"),
    "empty objects": repeated("{}"),
    "arrays of one": repeated("[1]"),
    "arrays in arrays": repeated("[[]]"),
    "arrays of five": repeated("[1,1,1,1,1]"),
    "objects with one key": repeated('{"":0}'),
    "objects with six keys": repeated('{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0}'),
    "letters": repeated('"a"'),
    "short strings": repeated('"ab"'),
    "other letters": repeated('"éé"'),
    "emoji": repeated('"😀"'),
    "pairs of surrogates": repeated('"\\ud83d\\ude00"'),
    "digits": repeated("1"),
    "whole numbers": repeated("999"),
    "fractions": repeated("1e1"),
    "negative zeros": repeated("-0"),
    "long numbers": repeated("9" * strict_json.MAX_DIGITS),
    "constants": repeated("true"),
    "keys of numbers": keyed("0"),
    "keys of strings": keyed('""'),
    "keys of objects": keyed("{}"),
    "keys of objects with a key": keyed('{"":0}'),
    "one key many times": repeated('"a":0', "{", "}"),
    "nested arrays": repeated("[" * 900 + "]" * 900),
    "nested objects": repeated('{"":' * 900 + "1" + "}" * 900),
    "deep arrays": lambda length: "[" * length,
    "deep objects": lambda length: '{"":' * (length // 4),
    "one string": lambda length: '"' + "a" * length + '"',
    "one string, wide": lambda length: '"😀' + "a" * length + '"',
    "one number": lambda length: "9" * length,
    "line breaks": lambda length: '"' + "\\n" * (length // 2) + '"',
    "spaces": lambda length: " " * length,
}


def peak(reader: Callable[[bytes], object], content: bytes) -> tuple[float, str]:
    """The most memory that reading ``content`` takes, for each of its bytes and with these, and the refusal."""
    tracemalloc.start()
    try:
        reader(content)
        refusal = ""
    except shardsave.ShardSaveError as error:
        refusal = str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return 1 + most / len(content), refusal


@pytest.fixture(autouse=True)
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers all bounds as much as the documents are shorter."""
    monkeypatch.setattr(header, "_STEP", header._STEP * LENGTH // header.MAX_HEADER_BYTES)
    monkeypatch.setattr(strict_json, "MAX_DOCUMENT_MEMORY", strict_json.MAX_DOCUMENT_MEMORY * LENGTH // header.MAX_HEADER_BYTES)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("values", VALUES)
def test_memory_of_a_hostile_document(reader: str, values: str) -> None:
    """Catches a short document that fills the memory before it is refused."""
    content = f'{{"a":{VALUES[values](LENGTH)}}}'.encode()
    if reader == "header":
        content = len(content).to_bytes(8, "little") + content
    ratio, refusal = peak(READERS[reader], content)
    assert refusal and ratio < RATIO, refusal


@pytest.mark.parametrize("values", VALUES)
def test_memory_of_a_short_document(values: str) -> None:
    """Catches a document that is too short to be counted, and takes more memory than any may."""
    length, content = LENGTH, b""
    while not content or strict_json.is_counted(content):
        length = length * 9 // 10
        content = f'{{"a":{VALUES[values](length)}}}'.encode()
    ratio, refusal = peak(READERS["index"], content)
    assert ratio * len(content) < strict_json.MAX_DOCUMENT_MEMORY and "bytes of memory" not in refusal


@pytest.mark.parametrize(
    "text", ['{{"__metadata__":{{"format":"😀{a}"}}}}', '{{"😀{a}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}']
)
def test_memory_of_a_wide_header(text: str) -> None:
    """Catches a header of characters of four bytes each that is in memory three times."""
    content = text.format(a="a" * (LENGTH - 1000)).encode()
    ratio, refusal = peak(READERS["header"], len(content).to_bytes(8, "little") + content)
    assert not refusal and ratio < RATIO


def test_memory_of_many_kinds_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a header whose tensors all have different shapes, and whose shapes are all remembered."""
    monkeypatch.setattr(header, "_MOST_KINDS", header._MOST_KINDS * LENGTH // header.MAX_HEADER_BYTES)
    entries = (f'"{n}":{{"dtype":"U8","shape":[0,{n}],"data_offsets":[0,0]}}' for n in range(LENGTH // 64))
    content = ("{" + ",".join(entries) + "}").encode()
    ratio, refusal = peak(READERS["header"], len(content).to_bytes(8, "little") + content)
    assert not refusal and ratio < 8


@pytest.mark.parametrize("member", ["weight_map", "shards"])
def test_memory_of_an_index_of_many_files(monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    """Catches an index that names more files than a save numbers: each would take far more memory than its name."""
    monkeypatch.undo()
    names = {f"t{n}": f"{n}" for n in range(100_000)}
    index: dict[str, object] = {"weight_map": names if member == "weight_map" else {}}
    if member == "shards":
        shards = {file: [8, 8, "0" * 16] for file in names.values()}
        index["shardsave"] = {"requires": [], "durable": True, "flags": None, "ties": {}, "metadata": {}, "shards": shards}
        index["shardsave"] |= {"supersedes": None, "crc64nvme": ""}  # type: ignore[operator]
    content = json.dumps(index).encode()
    if member == "shards":
        content = content[:-3]
        content += f"{crc64(content):016x}".encode() + END
    with pytest.raises(shardsave.CorruptCheckpointError, match="at most 99999 files expected, it names 100000; no shard"):
        parse_index(content, "index")


def test_memory_of_a_hostile_config(tmp_path: Path) -> None:
    """Catches a config.json that fills the memory before it is refused."""
    content = f'{{"a":{VALUES["arrays in arrays"](LENGTH)}}}'.encode()
    (tmp_path / "config.json").write_bytes(content)
    ratio, refusal = peak(lambda _: read_config(str(tmp_path)), content)
    assert refusal.startswith("corrupt config.json") and "bytes of memory expected" in refusal and ratio < RATIO


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("wide", ["", "😀"])
def test_memory_at_the_bound(values: str, wide: str) -> None:
    """Catches an estimate that is below what a document takes: as many values as are just accepted, and text up to the length."""
    length = LENGTH * 4 // 5 if wide or "😀" in VALUES[values](10) else LENGTH  # wide text takes half of the bound by itself
    low, high = 0, length
    while high - low > 100:
        middle = (low + high) // 2
        content = f'{{"a":{VALUES[values](middle)},"b":"{wide}'.encode()
        content += b"a" * (length - len(content)) + b'"}'
        try:
            strict_json.check_memory(content)
            low, accepted = middle, content
        except strict_json.NotJSON:
            high = middle
    ratio, refusal = peak(READERS["index"], accepted)
    assert "bytes of memory" not in refusal and ratio * len(accepted) < RATIO * LENGTH, refusal
    if low < length // 2 and not values.startswith("deep"):
        assert ratio > 2.5  # so the values do count


def header_text(compact: bool) -> str:
    separators = (",", ":") if compact else None
    entries = {
        f"model.layers.{n // 10}.block.weight_{n % 10}": {"dtype": "F32", "shape": [16], "data_offsets": [64 * n, 64 * n + 64]}
        for n in range(LENGTH // (95 if compact else 105))
    }
    return json.dumps(entries, separators=separators)


def test_memory_of_an_honest_header() -> None:
    """Catches a bound that refuses a header of 100 MB, with 1.15 million tensors."""
    for compact in (True, False):
        content = header_text(compact).encode()
        assert 0.8 * LENGTH < len(content) <= LENGTH
        data = len(content).to_bytes(8, "little") + content
        count = content.count(b"dtype")
        ratio, refusal = peak(lambda _: parse_header(data, len(data) + 64 * count, "header"), content)
        assert not refusal and ratio < 7


def test_memory_of_an_honest_index() -> None:
    """Catches a bound that refuses an index of 100 MB, of 1.15 million tensors."""
    names = {
        f"model.layers.{n // 10}.block.weight_{n % 10}": f"model-{n // 100 + 1:05}-of-00070.safetensors" for n in range(6900)
    }
    content = json.dumps({"metadata": {}, "weight_map": names}).encode()
    assert 0.8 * LENGTH < len(content) <= LENGTH
    ratio, refusal = peak(READERS["index"], content)
    assert not refusal and ratio < RATIO


def test_files_of_an_index_share_their_names() -> None:
    """Catches an index that keeps the name of a file for each tensor in it: that takes nearly as much memory as the text."""
    content = json.dumps({"weight_map": {f"{n}": f"{n % 2}.safetensors" for n in range(100)}}).encode()
    files = [*parse_index(content, "index").weight_map.values()]
    assert files == [f"{n % 2}.safetensors" for n in range(100)] and len({id(file) for file in files}) == 2


def test_memory_of_an_honest_architecture(tmp_path: Path) -> None:
    """Catches a bound that refuses an architecture of 140,000 layers, of 44 MB."""
    shardsave.save(nn.Sequential(*(nn.Linear(1, 1) for _ in range(700))), tmp_path, durable=False, architecture=True)
    content = next(path for path in tmp_path.glob("*.json") if path.name != INDEX).read_bytes()
    assert len(content) > 0.43 * LENGTH
    ratio, refusal = peak(READERS["architecture"], content)
    assert not refusal and ratio < RATIO


def test_nothing_is_saved_that_cannot_be_read_again(tmp_path: Path) -> None:
    """Catches an architecture or metadata that a save writes, and a load refuses because of its memory."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(1000)))
    with pytest.raises(
        shardsave.UnsupportedModuleError, match="since no more can be loaded, it may take .*; nothing was written"
    ):
        shardsave.save(model, tmp_path, architecture=True)
    with pytest.raises(TypeError, match="metadata must be JSON values that can be read back"):
        shardsave.save({}, tmp_path, metadata={"a": [[] for _ in range(100_000)]})
    names = {"a" * n: torch.zeros(0) for n in range(1, 60)} | {f"{n}": torch.zeros(0) for n in range(15_000)}
    with pytest.raises(ValueError, match="need an index that could not be read again"):
        shardsave.save(names, tmp_path)
    assert not list(tmp_path.glob("*.json"))
