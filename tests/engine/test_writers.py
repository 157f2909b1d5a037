"""How the C++ engine's workers share files that are written through the page cache: a file admits one writer at a time.

Method: ``native.run`` on files of one piece each; lent memory shows the order of the blocks, ticks count the threads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

native = pytest.importorskip("shardsave._native")

BLOCK = 4096


def write(
    folder: Path,
    memory: int,
    pieces: list[NDArray[np.uint8]],
    workers: int,
    *,
    slot: int = BLOCK,
    lend: Callable[..., None] | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> list[bytes]:
    """Writes each piece to a file of its own, and returns the contents of the files."""
    paths = [folder / str(number) for number in range(len(pieces))]
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    blocks, segments = [], []
    for file, piece in enumerate(pieces):
        for at in range(0, piece.nbytes, slot):
            blocks.append((file, at, slot, len(segments)))
            segments.append((memory, piece.ctypes.data + at if memory == native.HOST else 0, slot, 0, file, at))
    table: dict[str, Any] = {
        "files": np.array(descriptors, np.int64),
        "blocks": np.array(blocks, np.int64),
        "segments": np.array(segments, np.int64),
        "piece_bytes": np.array([piece.nbytes for piece in pieces], np.int64),
    }
    try:
        native.run(
            write=True,
            access="buffered",
            checksum=True,
            streams=[],
            workers=workers,
            slot_bytes=slot,
            lend=lend,
            tick=tick,
            **table,
        )
        return [path.read_bytes() for path in paths]
    finally:
        native.release_ring()
        for descriptor in descriptors:
            os.close(descriptor)


def test_files_take_turns(tmp_path: Path) -> None:
    """Catches workers that all wait for one file while others are free; and more files at a time than workers can use."""
    count, workers = 30, 2
    pieces = [np.full(count * BLOCK, number, np.uint8) for number in range(5)]
    order: list[int] = []

    def lend(piece: int, offset: int, view: memoryview) -> None:
        order.append(piece)
        view[:] = pieces[piece][offset : offset + len(view)].tobytes()

    assert write(tmp_path, native.LENT, pieces, workers, lend=lend) == [piece.tobytes() for piece in pieces]
    assert Counter(order) == dict.fromkeys(range(5), count)
    for first in (0, 2):  # two files at a time, in turn; each worker may hold back one block
        half = order[first * count : (first + 1) * count]
        assert abs(half.count(first) - half.count(first + 1)) <= 2 * workers, order


def test_no_more_writers_than_a_file_has_room_for(tmp_path: Path) -> None:
    """Catches workers that only wait for the lock of one file."""
    before = len(os.listdir("/proc/self/task"))
    seen: list[int] = []
    piece = np.ones(64 << 20, np.uint8)

    def tick(_: int) -> None:
        seen.append(len(os.listdir("/proc/self/task")) - before)

    assert write(tmp_path, native.HOST, [piece], 8, slot=1 << 20, tick=tick) == [piece.tobytes()]
    assert max(seen) <= 2, seen
