"""The engine without the extension: one buffer, numpy and torch. It writes the same bytes as the C++ engine, and is its oracle in tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from shardsave._common import os_calls
from shardsave._engine.blocks import Blocks
from shardsave._engine.transfer import BLOCK_BYTES, Piece, Request, Tick, Transfer, TransferFault, Windows, out_of_memory
from shardsave._format import crc64


def reserve(pieces: Sequence[Piece]) -> None:
    """As `shardsave._engine.engine.reserve`."""
    _staging_memory()


def staging_bytes(pieces: Sequence[Piece]) -> int:
    """As `shardsave._engine.engine.staging_bytes`."""
    return BLOCK_BYTES


def run(request: Request, tick: Tick) -> Transfer:
    """As `shardsave._engine.engine.write`, `read` and `gather`, always through the page cache."""
    files, into, taken = request.files, request.into, request.taken
    pieces, piece_bytes = request.pieces, request.blocks.piece_bytes.tolist()
    _check_destination(request)
    sums = [0] * len(pieces)
    done = 0
    memory = _staging_memory() if into is None else into
    for block, (file, offset, length, segments) in enumerate(_each_block(request.blocks)):
        slot = memory[:length] if into is None else memory[offset : offset + length]
        window = _window(request.windows, block, lambda: tick(done))
        if window is not None:
            slot = window[:length]
        _, _, last_length, at = segments[-1]
        used = at + last_length
        if not request.write and files is not None:
            _read_block(files, file, offset, slot, used)
        for number, piece_offset, count, at in segments:
            source = pieces[number]
            part = slot[at : at + count]
            if request.write and source is not None:
                source.gather(piece_offset, part)
                if taken is not None:
                    taken[number] += count
            if request.checksum:
                bytes_after = piece_bytes[number] - piece_offset - count
                sums[number] ^= crc64.shift(crc64.raw(np.frombuffer(part, np.uint8)), bytes_after)
            if not request.write and source is not None:
                source.scatter(piece_offset, part)
            done += count
        if request.write and files is not None:
            slot[used:] = bytes(length - used)
            _write_block(files, file, offset, slot)
            if request.start_writeback:
                os_calls.start_writeback(files[file], offset, length)
        if window is not None and request.windows is not None:
            request.windows.give_back(block)
        tick(done)
    finished = map(crc64.finish, sums, piece_bytes) if request.checksum else ()
    return Transfer(tuple(finished), (False,) * len(files or ()), BLOCK_BYTES if into is None else 0, pinned=False)


def _window(windows: Windows | None, block: int, wait: Callable[[], object]) -> memoryview | None:
    """The window of ``block`` as soon as it may be used, None if it has none; calls ``wait`` again and again meanwhile."""
    if windows is None or not windows.of_block[block]:
        return None
    while (window := windows.take(block)) is None:
        wait()
    return window


def _check_destination(request: Request) -> None:
    """Raises ValueError if a segment is outside ``request.into``."""
    if request.into is None:
        return
    if request.into.readonly:
        raise ValueError("into: the memory is read-only")
    table, segments, _ = request.blocks
    block = np.searchsorted(table[:, 3], np.arange(len(segments)), side="right") - 1
    ends = table[block, 1] + segments[:, 3] + segments[:, 2]
    if ends.max(initial=0) > len(request.into):
        raise ValueError("a block is outside the destination")


def _staging_memory() -> memoryview:
    try:
        return np.empty(BLOCK_BYTES, np.uint8).data
    except MemoryError as error:
        raise out_of_memory("allocation of staging memory", BLOCK_BYTES) from error


def _each_block(blocks: Blocks) -> Iterator[tuple[int, int, int, list[list[int]]]]:
    """For each block: file, offset, length and its segments, in the order of their offsets in the block."""
    rows = blocks.table.tolist()
    for (file, offset, length, first), (*_, next_first) in zip(rows, [*rows[1:], [len(blocks.segments)]]):
        yield file, offset, length, blocks.segments[first:next_first].tolist()


def _write_block(files: Sequence[int], file: int, offset: int, slot: memoryview) -> None:
    done = 0
    while done < len(slot):
        try:
            done += os.pwrite(files[file], slot[done:], offset + done)
        except OSError as error:
            raise TransferFault(file, "pwrite", error.errno or 0, offset + done, len(slot) - done) from error


def _read_block(files: Sequence[int], file: int, offset: int, slot: memoryview, needed: int) -> None:
    """Reads at least the ``needed`` first bytes; the padding may lie beyond the end of the file."""
    done = 0
    while done < needed:
        try:
            count = os.preadv(files[file], [slot[done:]], offset + done)
        except OSError as error:
            raise TransferFault(file, "pread", error.errno or 0, offset + done, len(slot) - done) from error
        if count == 0:
            raise TransferFault(file, "pread", 0, offset + done, needed - done, "the file ends here")
        done += count
