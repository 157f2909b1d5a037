"""Writing and reading blocks of bytes: chooses between the C++ engine and the portable one, which move the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._common import backend, shutdown
from shardsave._common.imports import import_at_use
from shardsave._engine.blocks import Blocks
from shardsave._engine.host_memory import HostMemory as HostMemory
from shardsave._engine.transfer import Access, Engine, Piece, Request, Tick, Transfer, Windows, out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._common.sources import ByteSource


def reserve(pieces: Sequence[Piece]) -> None:
    """Allocates the staging memory for a run with ``pieces``, so that a lack of it is known before anything is written.

    Raises TransferFault.
    """
    _chosen_engine().reserve(pieces)


def staging_bytes(pieces: Sequence[Piece]) -> int:
    """The most staging memory that `reserve` allocates for ``pieces``."""
    return _chosen_engine().staging_bytes(pieces)


def write(
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    *,
    access: Access,
    start_writeback: bool,
    checksum: bool = True,
    workers: int | None = None,
    taken: NDArray[np.int64] | None = None,
    windows: Windows | None = None,
    tick: Tick,
) -> Transfer:
    """Writes ``blocks`` of ``pieces`` to the descriptors ``files``. Whole blocks are written; the last one of a file is padded with zeros.

    ``start_writeback`` is for files whose file system refuses O_DIRECT: the disk starts at once on blocks that are written through the
    page cache. It needs ``access="direct"``. ``tick(bytes done)`` is called on this thread about every 10 ms, or after each block
    without the extension; an exception from it ends the run and is raised. Raises TransferFault.

    ``workers``: at most so many threads copy and sum at one time, others wait for the disk; None: as many as are useful. ``taken``, a
    number for each piece: how many bytes have been read from the piece's own memory is added while the run goes on. A thread that finds
    all bytes of a piece there may change it.
    ``windows``: memory in which other processes fill blocks; blocks are then taken in the order of the table.
    """
    if start_writeback and access != "direct":
        raise ValueError(f"start_writeback needs access='direct', not {access!r}")
    if taken is not None and (taken.dtype != np.int64 or taken.shape != (len(pieces),)):
        raise ValueError(f"taken needs one int64 for each of {len(pieces)} pieces, not {taken.dtype} of shape {taken.shape}")
    return _run(Request(True, files, blocks, pieces, access, start_writeback, checksum, workers, taken, windows=windows), tick)


def gather(
    blocks: Blocks,
    pieces: Sequence[ByteSource],
    *,
    into: memoryview | None = None,
    workers: int | None = None,
    checksum: bool = True,
    tick: Tick,
) -> Transfer:
    """Copies ``pieces`` ``into`` memory, writable bytes, or only sums them. No file takes part: that of every block is 0.

    A block at offset o begins at ``into[o]``. Bytes of it that belong to no piece stay as they are, and may lie outside. ``workers`` and
    ``tick`` are those of `write`. Raises ValueError before anything is copied, if a piece is outside ``into``, and TransferFault.
    """
    return _run(Request(True, None, blocks, pieces, "buffered", False, checksum, workers, into=into), tick)


def read(
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    *,
    access: Access = "auto",
    checksum: bool = True,
    windows: Windows | None = None,
    tick: Tick,
) -> Transfer:
    """Fills ``pieces`` from ``blocks`` of the descriptors ``files``; the mirror image of `write`.

    ``access="auto"`` reads a file through the page cache if (almost) all of it is cached, and past it otherwise.
    ``windows``: memory out of which other processes take blocks; blocks are then read in the order of the table.
    """
    return _run(Request(False, files, blocks, pieces, access, False, checksum, windows=windows), tick)


def _chosen_engine() -> Engine:
    if backend.native is None:
        import_at_use("shardsave._engine.portable")
        from shardsave._engine import portable

        return portable
    import_at_use("shardsave._engine.native")
    from shardsave._engine import native

    return native


_chosen_engine()  # is imported now, not while the first save runs; a process uses only one of them


def _run(request: Request, tick: Tick) -> Transfer:
    raised_by_tick: list[MemoryError] = []

    def tick_unless_ending(done: int) -> None:
        shutdown.raise_if_ending()
        try:
            tick(done)
        except MemoryError as error:
            raised_by_tick.append(error)
            raise

    engine = _chosen_engine()
    backend.warn_if_portable()
    try:
        return engine.run(request, tick_unless_ending)
    except MemoryError as error:
        if error in raised_by_tick:
            raise
        raise out_of_memory("allocation of working memory", 0) from error
