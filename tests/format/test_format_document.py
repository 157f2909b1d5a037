"""FORMAT.md is enough to write a reader: its example, its checksum and its tables match the files that `save` writes."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import awscrt.checksums
import pytest
import torch

import shardsave
from shardsave._format.dtypes import BY_NAME
from shardsave._format.index import Moment
from shardsave._format.index_parsing import _parse_flags
from support import ROOT
from training_state import save_with_training, training_tensors
from transformers_models import tiny

DOCUMENT = (ROOT / "FORMAT.md").read_text()
SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"


def block_after(words: str) -> str:
    """The first code block after ``words``."""
    block = re.search(r"```(?:python)?\n(.*?)```", DOCUMENT[DOCUMENT.index(words) :], re.DOTALL)
    assert block is not None
    return block[1]


def hexdump(data: bytes) -> Iterator[str]:
    """The lines of ``hexdump -C``."""
    before, skipped = b"", False
    for at in range(0, len(data), 16):
        line = data[at : at + 16]
        if line == before and len(line) == 16:
            if not skipped:
                yield "*"
            skipped = True
            continue
        before, skipped = line, False
        digits = [f"{byte:02x}" for byte in line]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        yield f"{at:08x}  {' '.join(digits[:8]):<23}  {' '.join(digits[8:]):<23}  |{text}|"
    yield f"{len(data):08x}"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that the document's example writes."""
    monkeypatch.chdir(tmp_path)
    exec(block_after("## A whole checkpoint"), {"torch": torch, "shardsave": shardsave})
    return tmp_path / "ckpt"


@pytest.fixture
def crc64nvme() -> Any:
    """The document's function."""
    names: dict[str, Any] = {}
    exec(block_after("## A checksum"), names)
    return names["crc64nvme"]


def test_the_example_matches_the_written_files(example: Path) -> None:
    """Catches a written file that changed by a byte when the document did not. A failure shows the new text for the document."""
    assert sorted(path.name for path in example.iterdir()) == [SHARD, INDEX]
    shown = "\n".join(hexdump((example / SHARD).read_bytes())) + "\n"
    assert block_after("as `hexdump -C` shows it") == shown, shown
    assert block_after(f"`{INDEX}`, one line").encode() == (example / INDEX).read_bytes(), (example / INDEX).read_text()


def test_a_reader_from_the_document_alone(crc64nvme: Any) -> None:
    """Catches an example that contradicts the text. This reader uses only the document's code blocks and rules."""
    lines = block_after("as `hexdump -C` shows it").splitlines()
    data = bytearray()
    for line in lines:
        if line == "*":
            repeated = data[-16:]
            continue
        at = int(line[:8], 16)
        while len(data) < at:
            data += repeated
        data += bytes.fromhex(line[8:58].replace(" ", ""))
    text = block_after(f"`{INDEX}`, one line").encode()
    assert text.endswith(b'"}}\n') and f"{crc64nvme(text[:-20]):016x}".encode() == text[-20:-4]
    index = json.loads(text)
    record = index["shardsave"]
    ((shard, (length, header_length, checksum)),) = record["shards"].items()
    assert (shard, length, f"{crc64nvme(data[:header_length]):016x}") == (SHARD, len(data), checksum)
    (n,) = struct.unpack("<Q", data[:8])
    assert header_length == 8 + n
    header = json.loads(data[8 : 8 + n])
    digits = header.pop("__metadata__")["shardsave.crc64nvme"]
    values = {}
    for number, (name, tensor) in enumerate(header.items()):
        begin, end = tensor["data_offsets"]
        raw = bytes(data[header_length + begin : header_length + end])
        assert f"{crc64nvme(raw):016x}" == digits[16 * number : 16 * number + 16]
        values[name] = (tensor["dtype"], tensor["shape"], raw)
    assert values == {"weight": ("F32", [1, 2], struct.pack("<2f", 1.0, -2.5)), "mask": ("U8", [3], b"\1\0\1")}
    assert index["weight_map"] == {"mask": SHARD, "weight": SHARD} and index["metadata"] == {"total_size": 11}
    assert record["ties"] == {"tied": "weight"} and record["flags"] == {"default": "trainable", "none": ["mask"]}
    assert record["metadata"] == {"run": "7"} and record["supersedes"] is None and record["requires"] == []


def test_checksum_of_the_document(crc64nvme: Any) -> None:
    """Catches a code block whose checksum differs from that of a third-party implementation."""
    assert f"{crc64nvme(b'123456789'):016x}" == "ae8b14860a799888" and crc64nvme(b"") == 0
    for data in (b"\0", bytes(range(256)) * 3):
        assert crc64nvme(data) == awscrt.checksums.crc64nvme(data)


def test_dtypes_of_the_document() -> None:
    """Catches a dtype that is missing in the document, or has another size there."""
    line = DOCUMENT[DOCUMENT.index("- `dtype` is one of") : DOCUMENT.index("- `__metadata__` →")]
    sizes = {}
    for names, size in re.findall(r"`([A-Z0-9_ ]+)` \((\d)[^)]*\)", line):
        sizes.update(dict.fromkeys(names.split(), 8 * int(size)))
    assert "`F4`, two elements to a byte" in line
    assert sizes | {"F4": 4} == {name: row.bits for name, row in BY_NAME.items()}


@pytest.mark.slow
def test_members_of_the_document(tmp_path: Path) -> None:
    """Catches a member of the index that is missing in the table, is never written, or has another type than in the table."""
    kinds = {
        "integer": int,
        "boolean": bool,
        "string": str,
        "object": dict,
        "list of strings": list,
        "`null`": type(None),
        "number": float,
    }
    section = DOCUMENT[DOCUMENT.index("## The index") : DOCUMENT.index("## An architecture")]
    table = {name: kind for name, kind in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)}
    sources = (torch.nn.Linear(1, 1), {"x": torch.ones(1)}, tiny("Mixtral"), *[{"x": torch.ones(1)}] * 2)
    moment = {"step", "epoch", "metrics", "ranks", "created"}
    optional: tuple[set[str], ...] = ({"parts"}, set(), {"companions", "module_flags"}, moment | {"parts"}, {"shared"})
    seen = set()
    for source, more in zip(sources, optional):
        if moment <= more:
            save_with_training(source, tmp_path, moment=Moment(3, 1.5, {"loss": 0.5}, 1, "2026-11-30T05:40:00Z"))
        else:
            shardsave.save(source, tmp_path, architecture="parts" in more)
        record = json.loads((tmp_path / INDEX).read_bytes())["shardsave"]
        assert list(record)[-1] == "crc64nvme"
        assert record.keys() == table.keys() - {"parts", "companions", "module_flags", "shared"} - moment | more
        for name, value in record.items():
            assert type(value) in [kinds[kind] for kind in table[name].split(" or ")], name
            seen.add((name, type(value)))
        (tmp_path / "model.safetensors").write_bytes(b"lone")
    assert {("flags", dict), ("flags", type(None)), ("supersedes", dict), ("supersedes", type(None))} <= seen


@pytest.mark.slow
def test_training_state_of_the_document(tmp_path: Path, crc64nvme: Any) -> None:
    """Catches a training state that differs from what the document says. This reader uses only the document's rules."""
    section = DOCUMENT[DOCUMENT.index("## A training state") : DOCUMENT.index("### Boxes")]
    table = {name for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    save_with_training({"x": torch.ones(1)}, tmp_path)
    record = json.loads((tmp_path / INDEX).read_bytes())["shardsave"]
    file, length, header_length, checksum = record["parts"]["training state"]
    content = (tmp_path / file).read_bytes()
    assert re.fullmatch(r"training-[0-9a-f]{8}/index\.json", file) and record["requires"] == ["part directories"]
    assert (length, header_length, checksum) == (len(content), len(content), f"{crc64nvme(content):016x}")
    document = json.loads(content)
    assert document.keys() == table and document["format"] == "shardsave-training" and document["version"] == 1
    folder = (tmp_path / file).parent
    assert document["files"].keys() == {path.name for path in folder.iterdir()} - {"index.json"}
    names: list[str] = []
    for name, (length, header_length, checksum) in document["files"].items():
        content = (folder / name).read_bytes()
        assert len(content) == length and f"{crc64nvme(content[:header_length]):016x}" == checksum
        if name.endswith(".json"):
            values = json.loads(content)
            assert header_length == length and values["format"] == "shardsave-training-rank" and values["rank"] == 0
            assert list(values) == ["format", "version", "requires", "rank", "leaves"]
        else:
            header = json.loads(content[8:header_length])
            assert len(header.pop("__metadata__")["shardsave.crc64nvme"]) == 16 * len(header)
            names += header
    assert sorted(names) == sorted(training_tensors(1))


def test_flags_of_the_document(tmp_path: Path) -> None:
    """Catches an example of flags and ties that our reader does not read as the text says."""
    example = re.search(r'`"flags": (\{.*?\})` with\n`"ties": (\{.*?\})`', DOCUMENT)
    assert example is not None
    flags, ties = json.loads(example[1]), json.loads(example[2])
    names = ["embed.weight", "norm.running_mean", "norm.weight", *ties]
    assert _parse_flags(flags, names, "") == {"embed.weight": True, "norm.weight": False, "head.weight": False}
