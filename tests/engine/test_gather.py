"""`engine.gather`: what a write would put into files goes into memory or is only summed.

Method: the same pieces are written to a file and gathered, on both engines; sums must agree, the bytes must be those that the pieces
themselves give, and nothing else may change.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from shardsave._common.sources import ByteSource, CastSource, SwappedSource, TensorSource
from shardsave._engine import engine
from shardsave._engine.blocks import Blocks, blocks

#: Smaller than what the engines use, so that small pieces span many blocks.
BLOCK_BYTES = 256 << 10

UNTOUCHED = 0xAA


def nothing(_: int) -> None: ...


def all_kinds() -> list[ByteSource]:
    """Sources of every kind that the engines treat differently, several of them larger than a block."""
    numbers = torch.arange(150_000, dtype=torch.int32)
    strided = torch.arange(100_000, dtype=torch.float64).reshape(400, 250).t()
    tensors = [
        torch.tensor(7, dtype=torch.uint8),
        numbers,
        torch.empty(0, 3),
        strided,
        torch.tensor(1.5),
        torch.view_as_complex(torch.randn(50, 2, dtype=torch.float64)).conj(),
        *(torch.full((size,), size, dtype=torch.uint8) for size in range(1, 60)),
        numbers[5:1000],
        torch.tensor([True, False, True]).expand(4, 3),
    ]
    sources: list[ByteSource] = [TensorSource.of(tensor) for tensor in tensors]
    sources += [TensorSource(numbers, torch.float16), CastSource(TensorSource.of(strided), torch.bfloat16)]
    return [*sources, SwappedSource.of(numbers[:999]), *map(TensorSource.of, torch.arange(1000, dtype=torch.int16).split(2))]


def placed(pieces: Sequence[ByteSource], begin: int = 0, gap: int = 0) -> Blocks:
    """The pieces one after the other in file 0 from ``begin`` on, whatever their alignment, with ``gap`` bytes between them."""
    rows, end = [], begin
    for piece in pieces:
        rows.append((0, end, piece.nbytes, piece.dtype.itemsize))
        end += piece.nbytes + gap
    return blocks(np.array(rows, dtype=np.int64), BLOCK_BYTES)


def end_of(plan: Blocks) -> int:
    """Where the last segment ends."""
    return int(plan.table[-1, 1] + plan.segments[-1, 3] + plan.segments[-1, 2])


@pytest.mark.parametrize(("begin", "gap"), [(0, 0), (4097, 0), (3, 5), (4096, 5000)])
def test_memory_gets_what_a_file_gets(tmp_path: Path, engine_name: str, begin: int, gap: int) -> None:
    """Catches a wrong byte or sum of any kind of piece at any offset, and a byte between or after the pieces that was changed."""
    pieces = all_kinds()
    plan = placed(pieces, begin, gap)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        written = engine.write([descriptor], plan, pieces, access="buffered", start_writeback=False, tick=nothing)
    finally:
        os.close(descriptor)
    memory = np.full(end_of(plan) + 1, UNTOUCHED, np.uint8)
    expected = memory.copy()
    for piece in pieces:
        if piece.nbytes:
            piece.gather(0, expected.data[begin : begin + piece.nbytes])
        begin += piece.nbytes + gap
    done: list[int] = []
    gathered = engine.gather(plan, pieces, into=memory.data[:-1], tick=done.append)
    assert np.array_equal(memory, expected)
    assert gathered.sums == written.sums and gathered.direct == ()
    assert done[-1] == sum(piece.nbytes for piece in pieces) and done == sorted(done)
    assert engine.gather(plan, pieces, tick=nothing).sums == written.sums
    assert engine.gather(plan, pieces, into=memory.data, workers=1, checksum=False, tick=nothing).sums == ()
    assert np.array_equal(memory, expected)


def test_nothing_to_gather(engine_name: str) -> None:
    """Catches a failure without any block, or without any piece."""
    empty = [TensorSource.of(torch.empty(0)), TensorSource.of(torch.empty(2, 0))]
    for pieces in ([], empty):
        plan = blocks(np.array([(0, 0, 0, 1)] * len(pieces), dtype=np.int64).reshape(-1, 4), BLOCK_BYTES)
        assert engine.gather(plan, pieces, into=memoryview(bytearray(1)), tick=nothing).sums == (0,) * len(pieces)
        assert engine.gather(plan, pieces, tick=nothing).sums == (0,) * len(pieces)


def test_a_piece_outside_the_memory(engine_name: str) -> None:
    """Catches a write behind the end of the memory, or into memory that is read-only, and a refusal after bytes were copied."""
    pieces = all_kinds()
    plan = placed(pieces, 11, 3)
    memory = np.full(end_of(plan), UNTOUCHED, np.uint8)
    for length in (end_of(plan) - 1, end_of(plan) // 2, 0):
        with pytest.raises(ValueError, match="a block is outside the destination"):
            engine.gather(plan, pieces, into=memory.data[:length], tick=nothing)
    for number in range(len(plan.table)):
        plan.table[number, 1] += 1 << 40
        with pytest.raises(ValueError, match="a block is outside the destination"):
            engine.gather(plan, pieces, into=memory.data, tick=nothing)
        plan.table[number, 1] -= 1 << 40
    with pytest.raises((ValueError, BufferError), match="read-only|not writable"):
        engine.gather(plan, pieces, into=memory.data.toreadonly(), tick=nothing)
    assert (memory == UNTOUCHED).all()


class Gate(TensorSource):
    """A tensor whose bytes are to be had only once ``opened`` is set; ``entered`` tells that somebody waits for them."""

    __slots__ = ("entered", "opened")

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor, tensor.dtype)
        self.entered, self.opened = threading.Event(), threading.Event()

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        self.entered.set()
        assert self.opened.wait(60)
        super().gather(offset, view)


class Slow(TensorSource):
    """Forty blocks of ones, each of which takes a while; the one with the number ``broken`` cannot be read.

    ``gathered`` counts the blocks; ``threads`` holds the threads that asked for them, ``together`` how many ever did at one time.
    """

    __slots__ = ("_asking", "broken", "gathered", "threads", "together")

    def __init__(self, broken: int = -1) -> None:
        super().__init__(torch.ones(40 * BLOCK_BYTES, dtype=torch.uint8), torch.uint8)
        self.broken, self.gathered = broken, 0
        self.threads: set[int] = set()
        self._asking: list[int] = []
        self.together = 0

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        self._asking.append(offset)
        self.together = max(self.together, len(self._asking))
        time.sleep(0.01)
        self._asking.remove(offset)
        self.threads.add(threading.get_ident())
        if self.gathered == self.broken:
            raise RuntimeError("no bytes")
        self.gathered += 1
        super().gather(offset, view)


@pytest.mark.parametrize("to_memory", [True, False])
def test_an_exception_ends_it(engine_name: str, to_memory: bool) -> None:
    """Catches a run that goes on after its tick or a piece raised, and an exception that is lost."""
    into = memoryview(bytearray(40 * BLOCK_BYTES)) if to_memory else None

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    slow = Slow()
    with pytest.raises(KeyboardInterrupt):
        engine.gather(placed([slow]), [slow], into=into, workers=1, tick=interrupt)
    assert slow.gathered < 40
    slow = Slow(broken=3)
    with pytest.raises(RuntimeError, match="no bytes"):
        engine.gather(placed([slow]), [slow], into=into, workers=1, tick=nothing)
    assert slow.gathered == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_workers_than_wanted(tmp_path: Path, workers: int) -> None:
    """Catches a limit on those who copy that a write or a gathering ignores; and a write in which nobody copies while others wait for
    the disk.
    """
    pytest.importorskip("shardsave._native")
    written, buffered, gathered = Slow(), Slow(), Slow()
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        plan = placed([written])
        past_the_cache = engine.write(
            [descriptor], plan, [written], access="direct", start_writeback=True, workers=workers, tick=nothing
        )
        engine.write([descriptor], plan, [buffered], access="buffered", start_writeback=False, workers=workers, tick=nothing)
    finally:
        os.close(descriptor)
    engine.gather(placed([gathered]), [gathered], workers=workers, tick=nothing)
    assert written.together == workers
    if past_the_cache.direct == (True,):
        assert len(written.threads) > workers
    for slow in (buffered, gathered):
        assert slow.together <= workers and len(slow.threads) <= workers


def test_what_was_taken_may_change(tmp_path: Path, engine_name: str) -> None:
    """Catches a count before the bytes were read, one that falls, and one that is not the piece's length in the end."""
    fast, gate, late = torch.arange(500_000), Gate(torch.arange(3_000)), torch.arange(77)
    pieces: list[ByteSource] = [TensorSource.of(fast), gate, TensorSource.of(torch.empty(0)), TensorSource.of(late)]
    content = b"".join(tensor.numpy().tobytes() for tensor in (fast, gate.tensor, late))
    plan = placed(pieces)
    taken = np.array([0, 0, 0, 1000], np.int64)  # what is there is added to
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    seen = [taken.copy()]

    def write() -> None:
        engine.write([descriptor], plan, pieces, access="buffered", start_writeback=False, workers=1, taken=taken, tick=nothing)

    thread = threading.Thread(target=write)
    thread.start()
    while not gate.entered.is_set() and thread.is_alive():
        seen.append(taken.copy())
        time.sleep(0.001)
    counted = taken.copy()
    assert fast.nbytes - BLOCK_BYTES < counted[0] <= fast.nbytes  # the last block waits for the gate
    assert counted[1:].tolist() == [0, 0, 1000]
    fast[: counted[0] // 8].zero_()
    gate.opened.set()
    thread.join()
    os.close(descriptor)
    assert taken.tolist() == [fast.nbytes, gate.nbytes, 0, 1000 + late.nbytes]
    assert all((earlier <= later).all() for earlier, later in zip(seen, [*seen[1:], taken]))
    assert (tmp_path / "file").read_bytes()[: len(content)] == content


def test_wrong_counters(tmp_path: Path, engine_name: str) -> None:
    """Catches counters that are written behind their end, or of which a copy is made that nobody sees."""
    pieces: list[ByteSource] = [TensorSource.of(torch.ones(5)), TensorSource.of(torch.ones(6))]
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        for taken in (np.zeros(1, np.int64), np.zeros(2, np.int32), np.zeros((2, 1), np.int64)):
            with pytest.raises(ValueError, match="taken needs one int64 for each of 2 pieces"):
                engine.write(
                    [descriptor], placed(pieces), pieces, access="buffered", start_writeback=False, taken=taken, tick=nothing
                )
    finally:
        os.close(descriptor)
