"""Python's side of ``beneath.c``: arms it, and reads its records. For processes that were started with the library preloaded."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_library = ctypes.CDLL(None)


class Fate(IntEnum):
    """What happens to a call, or with ``_AFTER`` right after it. A process is killed in the middle of a write."""

    PASS = 0
    FAIL = 1
    FAIL_AFTER = 2
    SHORTEN = 3
    KILL = 4
    KILL_AFTER = 5
    INTERRUPT = 6
    INTERRUPT_AFTER = 7
    FAIL_FROM_HERE = 8  # this call and every later one fails: the disk is gone
    CUT = 9  # the file system loses its disk, and everything that its journal has not committed
    NO_SYNC = 10  # not of a single call: every fsync does nothing and reports success
    STOP = 11  # until a SIGCONT


class Met(NamedTuple):
    """The call that met its fate: its name, and the path of its file."""

    call: str
    path: Path


def arm(folder: Path, number: int, fate: Fate, error: int = errno.EIO) -> None:
    """Starts to watch ``folder``; the ``number``-th call on it (from 1) meets ``fate``."""
    _library.beneath_arm(os.fsencode(folder), ctypes.c_long(number), int(fate), error)


def seen() -> int:
    """The number of calls since `arm`."""
    _library.beneath_seen.restype = ctypes.c_long
    return int(_library.beneath_seen())


def disarm() -> Met | None:
    """Stops watching. Returns the call that met its fate, None if there were fewer calls."""
    _library.beneath_hit.restype = ctypes.c_char_p
    call, _, path = os.fsdecode(_library.beneath_hit()).partition(" ")
    _library.beneath_arm(b"", ctypes.c_long(0), 0, 0)
    return Met(call, Path(path)) if call else None


@contextmanager
def recorded(folder: Path, record: Path, number: int = 0, fate: Fate = Fate.PASS) -> Iterator[None]:
    """Adds every call on ``folder`` to the file ``record``, for `read_record`. The ``number``-th may meet ``fate`` (with EIO)."""
    arm(folder, number, fate)
    _library.beneath_record(os.fsencode(record))
    try:
        yield
    finally:
        _library.beneath_record(None)
        _library.beneath_arm(b"", ctypes.c_long(0), 0, 0)


class Recorded(NamedTuple):
    """A recorded call. ``result``: -errno for a failure; ``a``, ``b``: its numbers, such as offset and length; ``data``: bytes written."""

    call: str
    result: int
    path: Path
    other: Path
    a: int
    b: int
    data: bytes


def read_record(record: Path) -> list[Recorded]:
    """The calls that `recorded` wrote, in the order in which they took effect."""
    rows = [line.split("\t") for line in record.read_text().splitlines()]
    written = record.with_name(f"{record.name}.data").read_bytes()
    ends = [int(row[6]) for row in rows]
    begins = [0, *ends[:-1]]
    return [
        Recorded(row[0], int(row[1]), Path(row[2]), Path(row[3]), int(row[4]), int(row[5]), written[begin:end])
        for row, begin, end in zip(rows, begins, ends)
    ]
