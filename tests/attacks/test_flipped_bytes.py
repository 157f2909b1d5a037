"""Method: every byte of a small checkpoint is flipped, one at a time: data, keys, JSON, padding, index. Each is found by every verb
that looks at it, and the tensor is named where it is one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from file_cases import flip_bits
from tampering import INDEX
from torch import nn

import shardsave

#: Bit 5 makes another letter of a letter, and another digit of no digit; the low bits make other digits.
FLIPS = (1, 32, 128)

DATA_START = 4096

VERBS: list[Callable[[Path], object]] = [
    shardsave.inspect,
    shardsave.load,
    lambda folder: shardsave.load(folder, mmap=True),
    shardsave.verify,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, one of them frozen; one tensor is tied, one is empty."""
    tied = nn.Parameter(torch.arange(5.0))
    state = {
        "a.weight": nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False),
        "a.steps": torch.arange(3).to(torch.int16),
        "b.weight": tied,
        "c.weight": tied,
        "b.empty": nn.Parameter(torch.ones(0)),
    }
    shardsave.save(state, tmp_path, metadata={"note": "x"}, durable=False)
    assert len(list(tmp_path.iterdir())) == 3
    return tmp_path


@contextlib.contextmanager
def flipped(path: Path, at: int) -> Iterator[None]:
    """The file with one bit of one byte turned over, for a while."""
    bit = FLIPS[at % len(FLIPS)]
    flip_bits(path, at, bit)
    yield
    flip_bits(path, at, bit)


def lengths(folder: Path) -> list[tuple[Path, int]]:
    """Every file, and how much of it is no tensor's: the whole index, and the headers."""
    return [(path, path.stat().st_size if path.name == INDEX else DATA_START) for path in sorted(folder.iterdir())]


def test_every_byte_of_headers_and_index(folder: Path) -> None:
    """Catches a byte, padding too, whose change is seen by no check before an offset is used."""
    for path, length in lengths(folder):
        original = path.read_bytes()
        for at in range(length):
            with flipped(path, at):
                for verb in VERBS:
                    with pytest.raises(shardsave.CorruptCheckpointError):
                        verb(folder)
        assert path.read_bytes() == original
    shardsave.verify(folder)


def test_every_byte_of_tensors(folder: Path) -> None:
    """Catches a byte of a tensor that no checksum covers, and a message that names another tensor."""
    shards = [path for path, _ in lengths(folder) if path.name != INDEX]
    places = [(path, *place) for path in shards for place in tensors_of(path)]
    assert sorted(name for _, name, _, _ in places) == ["a.steps", "a.weight", "b.empty", "b.weight"]
    assert sum(end - begin for _, _, begin, end in places) == sum(path.stat().st_size - DATA_START for path in shards)
    for path, name, begin, end in places:
        for at in range(begin, end):
            with flipped(path, at):
                for verb in (shardsave.load, shardsave.verify):
                    words = f"^corrupt shard {path.name}: tensor '{name}' has checksum"
                    with pytest.raises(shardsave.CorruptCheckpointError, match=words):
                        verb(folder)


def tensors_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, begin and end in the file, as safetensors has them."""
    header = json.loads(path.read_bytes()[8:DATA_START])
    del header["__metadata__"]
    return [(name, *(DATA_START + at for at in tensor["data_offsets"])) for name, tensor in header.items()]
