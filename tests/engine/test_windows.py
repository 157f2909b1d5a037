"""Windows: memory in which other threads or processes fill or empty blocks while the engine writes or reads them, in order."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardsave._common.sources import TensorSource
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks
from shardsave._engine.transfer import InWindow, TransferFault
from shardsave._format.crc64 import crc64

BLOCK = 1 << 16


class Two:
    """Two windows, used in turn; the window of a block is given when the one before the last was given back."""

    def __init__(self, of_block: NDArray[np.bool_], contents: dict[int, bytes] | None = None) -> None:
        self.of_block = of_block
        self.taken: list[int] = []
        self.read: dict[int, bytes] = {}
        self._contents = contents
        self._memory = memoryview(mmap.mmap(-1, 2 * BLOCK))
        self._order = np.flatnonzero(of_block).tolist()
        self._given_back: set[int] = set()
        self._asked: set[int] = set()
        self._lock = threading.Lock()

    def take(self, block: int) -> memoryview | None:
        with self._lock:
            place = self._order.index(block)
            if place >= 2 and self._order[place - 2] not in self._given_back:
                return None
            if block not in self._asked:  # the engine asks again
                self._asked.add(block)
                return None
            self.taken.append(block)
            window = self._memory[place % 2 * BLOCK :][:BLOCK]
            if self._contents is not None:
                window[: len(self._contents[block])] = self._contents[block]
            return window

    def give_back(self, block: int) -> None:
        with self._lock:
            self._given_back.add(block)
            begin = self._order.index(block) % 2 * BLOCK
            self.read[block] = bytes(self._memory[begin : begin + BLOCK])


def plan() -> tuple[Blocks, list[torch.Tensor], list[int]]:
    """Pieces in one file: those with an odd number lie in windows."""
    torch.manual_seed(0)
    tensors = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in (3 * BLOCK + 5, 7, 5 * BLOCK, 100_000, 3, 2 * BLOCK)]
    begins = np.cumsum([0, *(t.numel() for t in tensors)]).tolist()
    extents = np.array([(0, begin, t.numel(), 1) for begin, t in zip(begins, tensors)], dtype=np.int64)
    return blocks(extents, BLOCK), tensors, begins


def windowed(planned: Blocks) -> NDArray[np.bool_]:
    return np.logical_or.reduceat(planned.segments[:, 0] % 2 == 1, planned.table[:, 3])


@pytest.mark.parametrize("access", ["buffered", "direct"])
@pytest.mark.usefixtures("engine_name")
def test_a_write_from_windows(tmp_path: Path, access: str) -> None:
    """Catches bytes of a window that are not written or not summed, of other pieces that are lost there, and blocks out of order."""
    planned, tensors, begins = plan()
    whole = b"".join(bytes(t.numpy()) for t in tensors)
    in_window = bytearray(whole)
    for number, (begin, tensor) in enumerate(zip(begins, tensors)):
        if number % 2 == 0:
            in_window[begin : begin + tensor.numel()] = b"?" * tensor.numel()
    contents = {
        n: bytes(in_window[offset : offset + length]) for n, (_, offset, length, _) in enumerate(planned.table.tolist())
    }
    windows = Two(windowed(planned), contents)
    pieces = [TensorSource.of(t) if n % 2 == 0 else InWindow(t.dtype, t.shape, t.nbytes) for n, t in enumerate(tensors)]
    with open(tmp_path / "file", "wb+") as file:
        os.ftruncate(file.fileno(), -(-len(whole) // 4096) * 4096)
        result = engine.write(
            [file.fileno()], planned, pieces, access=access, start_writeback=False, windows=windows, tick=lambda _: 0
        )  # type: ignore[arg-type]
    assert (tmp_path / "file").read_bytes()[: len(whole)] == whole
    assert result.sums == tuple(crc64(bytes(t.numpy())) for t in tensors)
    assert sorted(windows.taken) == np.flatnonzero(windows.of_block).tolist()


@pytest.mark.usefixtures("engine_name")
def test_a_read_into_windows(tmp_path: Path) -> None:
    """Catches a window that is given back before the file has been read into it, and other pieces that do not get their bytes."""
    planned, tensors, _ = plan()
    whole = b"".join(bytes(t.numpy()) for t in tensors)
    (tmp_path / "file").write_bytes(whole)
    targets = [torch.zeros_like(t) for t in tensors]
    pieces = [TensorSource.of(t) if n % 2 == 0 else InWindow(t.dtype, t.shape, t.nbytes) for n, t in enumerate(targets)]
    windows = Two(windowed(planned))
    with open(tmp_path / "file", "rb") as file:
        result = engine.read([file.fileno()], planned, pieces, windows=windows, tick=lambda _: 0)
    assert result.sums == tuple(crc64(bytes(t.numpy())) for t in tensors)
    assert all(torch.equal(a, b) for a, b in zip(targets[::2], tensors[::2]))
    for block in windows.of_block.nonzero()[0].tolist():
        _, offset, length, _ = planned.table[block].tolist()
        assert windows.read[block][: min(length, len(whole) - offset)] == whole[offset : offset + length]


@pytest.mark.usefixtures("engine_name")
def test_errors_end_a_run_that_waits(tmp_path: Path) -> None:
    """Catches a run that waits for a window for ever, although the tick, the hook or a write has failed."""

    class Never(Two):
        def take(self, block: int) -> memoryview | None:
            time.sleep(0.001)
            return super().take(block) if block == 3 else None

    class Failing(Two):
        def take(self, block: int) -> memoryview | None:
            raise LookupError("no window")

    planned, tensors, _ = plan()
    pieces = [InWindow(t.dtype, t.shape, t.nbytes) for t in tensors]
    every = np.ones(len(planned.table), dtype=bool)

    def tick(_: int) -> None:
        raise KeyError("enough")

    with open(tmp_path / "file", "wb+") as file:
        for windows, error in ((Never(every), KeyError), (Failing(every), LookupError)):
            with pytest.raises(error):
                engine.write(
                    [file.fileno()], planned, pieces, access="buffered", start_writeback=False, windows=windows, tick=tick
                )
    with open(tmp_path / "file", "rb") as file, pytest.raises(TransferFault, match="write"):
        contents = dict.fromkeys(range(len(every)), b"")
        engine.write(
            [file.fileno()],
            planned,
            pieces,
            access="buffered",
            start_writeback=False,
            windows=Two(every, contents),
            tick=lambda _: 0,
        )


def test_blocks_of_several_files_stay_in_order(tmp_path: Path) -> None:
    """Catches files that take turns, as they do without windows: those who fill the windows know only the order of the table."""
    native = pytest.importorskip("shardsave._native")
    tensors = [torch.zeros(8 * BLOCK, dtype=torch.uint8) for _ in range(3)]
    planned = blocks(np.array([(n, 0, 8 * BLOCK, 1) for n in range(3)], dtype=np.int64), BLOCK)
    every = np.ones(len(planned.table), dtype=bool)
    windows = Two(every, dict.fromkeys(range(len(every)), b""))
    files = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(3)]
    try:
        pieces = [InWindow(t.dtype, t.shape, t.nbytes) for t in tensors]
        engine.write(files, planned, pieces, access="buffered", start_writeback=False, windows=windows, tick=lambda _: 0)
    finally:
        for fd in files:
            os.close(fd)
    assert all(abs(place - block) < native.SLOTS for place, block in enumerate(windows.taken))


def test_tables_that_do_not_fit() -> None:
    """Catches a piece in a window that its block does not have, which would be read from an address that nobody gave."""
    pytest.importorskip("shardsave._native")
    planned, tensors, _ = plan()
    pieces = [InWindow(t.dtype, t.shape, t.nbytes) for t in tensors]
    from shardsave._common import backend

    if backend.native is None:
        pytest.skip("only the C++ engine checks its tables")
    with pytest.raises(ValueError, match="window"):
        engine.write([0], planned, pieces, access="buffered", start_writeback=False, tick=lambda _: 0)
    short = Two(np.ones(len(planned.table) + 1, dtype=bool))
    with pytest.raises(ValueError, match="windows are for"):
        engine.write([0], planned, pieces, access="buffered", start_writeback=False, windows=short, tick=lambda _: 0)
