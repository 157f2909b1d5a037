"""Method: one bit of every byte of a small checkpoint is flipped, one byte at a time: data, keys, JSON, padding, index. Every verb that
reads the byte must refuse the checkpoint (of the padding, one verb after the other a byte); if the byte belongs to a tensor, the message
must name it.
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

pytestmark = pytest.mark.slow

#: The bits to flip, in turn. Bit 5 changes the case of a letter, bit 0 turns a digit into another one, and bit 7 makes a byte non-ASCII.
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
    """Flips one bit of the byte at ``at``, and flips it back afterwards."""
    bit = FLIPS[at % len(FLIPS)]
    flip_bits(path, at, bit)
    yield
    flip_bits(path, at, bit)


def lengths(folder: Path) -> list[tuple[Path, int]]:
    """Every file, with the length of its beginning that holds no tensor: a header, or the whole index."""
    return [(path, path.stat().st_size if path.name == INDEX else DATA_START) for path in sorted(folder.iterdir())]


def test_every_byte_of_headers_and_index(folder: Path) -> None:
    """Catches a byte, padding included, that no check covers before offsets are used."""
    for path, length in lengths(folder):
        original = path.read_bytes()
        padding = len(original[:length].rstrip(b" "))
        assert padding < length or path.name == INDEX
        for at in range(length):
            with flipped(path, at):
                for verb in VERBS if at < padding else [VERBS[at % len(VERBS)]]:
                    with pytest.raises(shardsave.CorruptCheckpointError):
                        verb(folder)
        assert path.read_bytes() == original
    shardsave.verify(folder)


def test_every_byte_of_tensors(folder: Path) -> None:
    """Catches a byte of a tensor that no checksum covers, and a message that names another tensor."""
    shards = [path for path, _ in lengths(folder) if path.name != INDEX]
    tensors = [(path, *tensor) for path in shards for tensor in tensors_of(path)]
    assert sorted(name for _, name, _, _ in tensors) == ["a.steps", "a.weight", "b.empty", "b.weight"]
    assert sum(end - begin for _, _, begin, end in tensors) == sum(path.stat().st_size - DATA_START for path in shards)
    for path, name, begin, end in tensors:
        for at in range(begin, end):
            with flipped(path, at):
                for verb in (shardsave.load, shardsave.verify):
                    words = f"^corrupt shard {path.name}: tensor '{name}' has checksum"
                    with pytest.raises(shardsave.CorruptCheckpointError, match=words):
                        verb(folder)


def tensors_of(path: Path) -> list[tuple[str, int, int]]:
    """The name, begin and end in the file of each tensor, from the header."""
    header = json.loads(path.read_bytes()[8:DATA_START])
    del header["__metadata__"]
    return [(name, *(DATA_START + at for at in tensor["data_offsets"])) for name, tensor in header.items()]
