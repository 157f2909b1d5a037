"""What a transfer is: the request, its result and its error. Both engines, `native` and `portable`, implement `Engine`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Union

from shardsave._common.sources import ByteSource
from shardsave._engine.blocks import Blocks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

#: The size of one slot of staging memory, in bytes: a block is never longer.
BLOCK_BYTES = 8 << 20

#: How files are accessed: through the page cache, past it (O_DIRECT) if the file system allows that, or chosen for each file.
Access = Literal["buffered", "direct", "auto"]

#: The place of the bytes of `InWindow` pieces, where other sources have the number of a device: that of the extension.
IN_WINDOW = -4

#: The same for host memory that nobody changes any more, of a source whose ``crc`` is the checksum of its bytes: that of the extension.
STILL = -5

#: Called with the number of bytes done so far.
Tick = Callable[[int], object]

#: The source or the destination of one stored tensor's bytes; None: the bytes are only read and summed.
Piece = Union[ByteSource, None]


class Windows(Protocol):
    """Memory that other processes fill or empty, in place of a slot, for some blocks of one run. The engine takes blocks in order.

    Threads: both methods are called on any worker, several at a time.
    """

    @property
    def of_block(self) -> NDArray[np.bool_]:
        """For each block of the run, whether it has a window."""

    def take(self, block: int) -> memoryview | None:
        """The window of ``block``, at least as long as the block and aligned like it; None: not yet, the engine asks again.

        For a write the bytes of `InWindow` pieces are in it. May wait for a short time (some 50 ms), without the GIL.
        """

    def give_back(self, block: int) -> None:
        """The engine has written the window to the file, or has read the file into it."""


class InWindow(NamedTuple):
    """A piece whose bytes other processes put into a block's window, or take out of it. The engine only sums them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    cuda_device: int = -1

    def memory(self) -> tuple[int, int]:
        return IN_WINDOW, 0

    def gather(self, offset: int, view: memoryview) -> None:
        """Nothing to do: ``view`` is a part of the window, and the bytes are there."""

    def scatter(self, offset: int, view: memoryview) -> None:
        """Nothing to do: the bytes stay in the window."""


class Request(NamedTuple):
    """One run of an engine: ``blocks`` of the descriptors ``files`` are written from ``pieces``, or read into them.

    ``files`` None, with ``write``: the blocks are copied ``into`` memory, or only summed if that is None too. ``workers``: the most
    that copy at one time, None: as many as are useful. ``taken``, with ``write``: for each piece, a counter of the bytes that were read
    of it.
    ``start_writeback``: the disk begins at once with blocks that were written through the page cache, so that a later fsync has less
    to wait for.
    """

    write: bool
    files: Sequence[int] | None
    blocks: Blocks
    pieces: Sequence[Piece]
    access: Access
    start_writeback: bool
    checksum: bool
    workers: int | None = None
    taken: NDArray[np.int64] | None = None
    into: memoryview | None = None
    windows: Windows | None = None


class Transfer(NamedTuple):
    """The result of a run. ``sums``: the CRC-64/NVME of each piece, empty without ``checksum``.

    ``direct``: for each file, whether it is known to have bypassed the page cache (the kernel says so from 6.1 on).
    """

    sums: tuple[int, ...]
    direct: tuple[bool, ...]
    staging_bytes: int
    pinned: bool
    notes: tuple[str, ...] = ()


class TransferFault(Exception):
    """A call on a file or a device failed; ``file`` is an index into the list of files, or -1."""

    def __init__(self, file: int, call: str, errno: int, offset: int, length: int, detail: str = "") -> None:
        super().__init__(file, call, errno, offset, length, detail)
        self.file = file
        self.call = call
        self.errno = errno
        self.offset = offset
        self.length = length
        self.detail = detail

    def __str__(self) -> str:
        reason = self.detail or os.strerror(self.errno)
        if self.file < 0:
            return f"{self.call}: {reason}"
        return f"{self.call} of {self.length} bytes at offset {self.offset}: {reason}"


def out_of_memory(call: str, length: int) -> TransferFault:
    """The fault for ``length`` bytes of memory that the system did not have."""
    return TransferFault(-1, call, errno.ENOMEM, 0, length)


class Engine(Protocol):
    """What both engines can do."""

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Allocates the staging memory for a run with ``pieces``. Raises TransferFault."""

    def staging_bytes(self, pieces: Sequence[Piece]) -> int:
        """The most staging memory for a run with ``pieces``, in bytes. Allocates nothing."""

    def run(self, request: Request, tick: Tick) -> Transfer:
        """Moves the bytes of ``request``. What ``tick`` raises ends the run and is raised. Raises TransferFault and MemoryError."""
