"""Pieces that nobody changes any more: their blocks are written from where they are, with the checksums that are known already.

Method: one buffer holds the pieces of a file as they are to be in it, but for what a case does to them; ``crc`` is a number that no
bytes have, so that it shows whether the engine has summed them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardsave._common import backend
from shardsave._common.sources import ByteRange, ByteSource, TensorSource
from shardsave._engine import engine
from shardsave._engine.blocks import blocks
from shardsave._engine.transfer import IN_WINDOW, STILL, Access

BLOCK_BYTES = 64 << 10
LENGTHS = (100_000, 60_000, 4096, 1, 40_000)

#: No sum of anything here.
KNOWN = 12345


class Still(TensorSource):
    """A tensor whose checksum is said to be known."""

    __slots__ = ("crc",)

    def __init__(self, tensor: torch.Tensor, crc: int | None = KNOWN) -> None:
        super().__init__(tensor, tensor.dtype)
        if crc is not None:
            self.crc = crc

    def memory(self) -> tuple[int, int]:
        return STILL, self.tensor.data_ptr()


class Buffer:
    """Whole pages of memory with random bytes. ``written``: the blocks at each offset of a file that came from there."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 << 20)
        self.array = np.frombuffer(self.memory, np.uint8)
        self.array[:] = np.random.default_rng(0).integers(0, 256, self.array.size, np.uint8)

    def tensor(self, begin: int, length: int) -> torch.Tensor:
        return torch.from_numpy(self.array)[begin : begin + length]


def pieces_at(buffer: Buffer, begin: int, gap: int = 0, kinds: Sequence[type] = ()) -> list[ByteSource]:
    pieces: list[ByteSource] = []
    for number, length in enumerate(LENGTHS):
        kind = kinds[number % len(kinds)] if kinds else Still
        tensor = buffer.tensor(begin, length)
        pieces.append(TensorSource.of(tensor) if kind is TensorSource else kind(tensor))
        begin += length + gap
    return pieces


def written(path: Path, pieces: Sequence[ByteSource], access: Access, checksum: bool = True) -> tuple[bytes, tuple[int, ...]]:
    ends = np.cumsum([0, *LENGTHS])
    plan = blocks(np.array([(0, 4096 + end, length, 1) for end, length in zip(ends, LENGTHS)], np.int64), BLOCK_BYTES)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        transfer = engine.write(
            [descriptor], plan, pieces, access=access, start_writeback=False, checksum=checksum, tick=lambda _: None
        )
    finally:
        os.close(descriptor)
    return path.read_bytes()[4096 : 4096 + sum(LENGTHS)], transfer.sums


@pytest.mark.parametrize("access", ["direct", "buffered"])
@pytest.mark.parametrize(
    "where",
    [
        {"begin": 8192},
        {"begin": 0},
        {"begin": 8192 + 64},
        {"begin": 4096, "gap": 64},
        {"begin": 4096, "kinds": (Still, TensorSource)},
        {"begin": 4096, "kinds": (Still, Still, TensorSource)},
    ],
    ids=str,
)
def test_the_bytes_are_those_of_the_pieces(tmp_path: Path, where: dict[str, Any], access: Access, engine_name: str) -> None:
    """Catches a block that is written from where it is although its pieces lie otherwise in the file, or are not all still."""
    pieces = pieces_at(Buffer(), **where)
    expected = b"".join(piece.tensor.numpy().tobytes() for piece in pieces)  # type: ignore[attr-defined]
    content, sums = written(tmp_path / "file", pieces, access)
    assert content == expected
    plain, computed = written(tmp_path / "plain", [TensorSource.of(p.tensor) for p in pieces], access)  # type: ignore[attr-defined]
    assert plain == expected
    if engine_name == "native":
        assert sums == tuple(KNOWN if isinstance(p, Still) else s for p, s in zip(pieces, computed))
    assert written(tmp_path / "file", pieces, access, checksum=False) == (expected, ())


@pytest.mark.skipif(backend.native is None, reason="the C++ engine is not built")
def test_no_byte_is_copied(tmp_path: Path) -> None:
    """Catches a snapshot that is copied once more before it is written: then nothing behind its end would be in the padding."""
    pieces = pieces_at(buffer := Buffer(), 8192)
    path = tmp_path / "file"
    written(path, pieces, "direct")
    end = 4096 + sum(LENGTHS)
    assert path.read_bytes()[end:] == buffer.array[8192 + sum(LENGTHS) :][: -end % 4096].tobytes()
    written(path, [TensorSource.of(p.tensor) for p in pieces], "direct")  # type: ignore[attr-defined]
    assert path.read_bytes()[end:] == bytes(-end % 4096)


@pytest.mark.skipif(backend.native is None, reason="the C++ engine is not built")
def test_still_pieces_elsewhere(tmp_path: Path) -> None:
    """Catches sums that are taken for known although they are not: of a part of such a piece, of one without a checksum, in memory."""
    buffer = Buffer()
    whole = buffer.tensor(4096, sum(LENGTHS))
    pieces = pieces_at(buffer, 4096)
    _, computed = written(tmp_path / "file", [TensorSource.of(p.tensor) for p in pieces], "direct")  # type: ignore[attr-defined]
    begins = np.cumsum([0, *LENGTHS]).tolist()
    parts = [ByteRange(Still(whole), begin, length) for begin, length in zip(begins, LENGTHS)]
    unknown = [Still(piece.tensor, None) for piece in pieces]  # type: ignore[attr-defined]
    for others in (parts, unknown):
        content, sums = written(tmp_path / "file", others, "direct")
        assert content == whole.numpy().tobytes() and sums == computed
    plan = blocks(np.array([(0, begin, length, 1) for begin, length in zip(begins, LENGTHS)], np.int64), BLOCK_BYTES)
    copy = bytearray(sum(LENGTHS))
    assert engine.gather(plan, pieces, into=memoryview(copy), tick=lambda _: None).sums == computed
    assert copy == whole.numpy().tobytes()


def test_numbers_of_memory() -> None:
    """Catches numbers that Python and the extension understand differently."""
    native = pytest.importorskip("shardsave._native")
    assert (native.STILL, native.IN_WINDOW) == (STILL, IN_WINDOW)


def test_still_memory_is_for_files() -> None:
    """Catches a run that sums still memory into nothing, or reads into it, unnoticed."""
    native = pytest.importorskip("shardsave._native")
    memory = (ctypes.c_uint8 * 4096)()
    table: dict[str, Any] = {
        "blocks": np.array([(0, 0, 4096, 0)], np.int64),
        "segments": np.array([(STILL, ctypes.addressof(memory), 4096, 0, 0, 0)], np.int64),
        "piece_bytes": np.array([4096], np.int64),
        "checksum": True,
        "streams": [],
        "workers": 1,
        "slot_bytes": 4096,
        "lend": None,
        "tick": lambda _: None,
        "access": "buffered",
    }
    for write, files in ((True, None), (False, np.array([0], np.int64))):
        with pytest.raises(ValueError, match="still memory is only written to files"):
            native.run(write=write, files=files, **table)
