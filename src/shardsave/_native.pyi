"""The C++ engine. `shardsave._engine` is the only module that calls `run`."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

#: Values of the first column of `segments`: a CUDA ordinal, or one of these.
HOST: int
LENT: int
DISCARD: int
IN_WINDOW: int
STILL: int

#: How many slots the ring has for host memory alone, and with a device: more workers than that only wait.
SLOTS: int
DEVICE_SLOTS: int

class Fault(Exception):
    """A failed call. ``args``: file (index into `files`, or -1), call, errno (or 0), offset, length, detail."""

class HostMemory:
    """Memory that forked children do not have, freed with the last view of it. ``pin_for``: a CUDA ordinal or -1."""

    def __init__(self, *, nbytes: int, pin_for: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def refusal(self) -> str:
        """Why it could not be pinned; empty if it is pinned or pinning was not wanted."""

class RunResult:
    sums: NDArray[np.uint64]
    direct: Sequence[bool]
    staging_bytes: int
    pinned: bool
    notes: Sequence[str]

def run(
    *,
    write: bool,
    files: NDArray[np.int64] | None,
    access: str,
    blocks: NDArray[np.int64],
    segments: NDArray[np.int64],
    piece_bytes: NDArray[np.int64],
    checksum: bool,
    streams: Sequence[tuple[int, int]],
    workers: int,
    slot_bytes: int,
    copiers: int = 0,
    lend: Callable[[int, int, memoryview], None] | None,
    tick: Callable[[int], object],
    into: Buffer | None = None,
    taken: NDArray[np.int64] | None = None,
    windowed: Sequence[int] = (),
    take_window: Callable[[int], Buffer | None] | None = None,
    give_window: Callable[[int], None] | None = None,
) -> RunResult:
    """Without ``files`` the blocks of a run that writes go ``into`` memory, or nowhere; ``taken`` counts what was read of each piece."""

def copy_boxes(copies: NDArray[np.int64], /) -> None:
    """Rows of source, destination (addresses), run; inner count, source stride, destination stride; outer count and strides; in bytes."""

def sync_files(descriptors: Sequence[int], /) -> Sequence[int]:
    """Calls fsync once for each, at the same time; returns the errno of each, 0 for success."""

def crc64(data: Buffer, /) -> int: ...
def crc64_of_rows(rows: NDArray[np.int64], /) -> NDArray[np.uint64]:
    """Rows of address, count, length and step; the raw sum of each."""

def crc64_shifted(raw_sums: NDArray[np.uint64], nbytes: NDArray[np.uint64], /) -> NDArray[np.uint64]: ...
def crc64_implementation() -> str: ...
def crc64_force_implementation(name: str) -> bool: ...
def cuda_available() -> bool: ...
def cuda_unavailable_reason() -> str: ...
def release_ring() -> None: ...
def reserve_staging(*, slot_bytes: int, pin_for: int) -> int: ...
