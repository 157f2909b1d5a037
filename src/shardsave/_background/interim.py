"""Stands for the engine's `gather` until that is there."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from shardsave._format.crc64 import crc64


class HostMemory:
    def __init__(self, nbytes: int, *, device: int = -1) -> None:
        self.nbytes = nbytes
        self.pinned = False
        self.note = ""
        self.view = np.empty(nbytes, np.uint8).data

    def close(self) -> None:
        pass


class _Transfer(NamedTuple):
    sums: tuple[int, ...]


def gather(blocks: Any, pieces: Any, *, into: Any = None, workers: Any = None, tick: Any = None) -> _Transfer:
    sums = []
    begin_of: dict[int, int] = {}
    table = blocks.table.tolist()
    firsts = [row[3] for row in table] + [len(blocks.segments)]
    for block, row in enumerate(table):
        for piece, piece_offset, _, at in blocks.segments[firsts[block] : firsts[block + 1]].tolist():
            begin_of.setdefault(piece, row[1] + at - piece_offset)
    for number, piece in enumerate(pieces):
        view = memoryview(bytearray(piece.nbytes))
        piece.gather(0, view)
        if into is not None and len(view):
            into[begin_of[number] : begin_of[number] + len(view)] = view
        sums.append(crc64(view))
    return _Transfer(tuple(sums))
