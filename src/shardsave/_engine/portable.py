"""The engine without the extension: one buffer, numpy and torch. Byte for byte what the C++ engine makes, and its oracle."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from shardsave._common.os_calls import start_writeback
from shardsave._engine import gather
from shardsave._engine.engine import BLOCK_BYTES, Piece, Tick, Transfer, TransferFault
from shardsave._format import crc64
from shardsave._format.layout import Blocks


def run(
    write: bool,
    files: Sequence[int],
    blocks: Blocks,
    pieces: Sequence[Piece],
    checksum: bool,
    durable: bool,
    tick: Tick,
) -> Transfer:
    """As `shardsave._engine.engine.write` and `read`, always through the page cache."""
    sums = [0] * len(pieces)
    done = 0
    try:
        staging = np.empty(BLOCK_BYTES, np.uint8).data
    except MemoryError as error:
        raise TransferFault(-1, "allocation of staging memory", errno.ENOMEM, 0, BLOCK_BYTES) from error
    for file, offset, length, segments in _each(blocks):
        slot = staging[:length]
        _, _, last, at = segments[-1]
        used = at + last
        if not write:
            _read_block(files, file, offset, slot, used)
        for number, piece_offset, count, at in segments:
            piece = pieces[number]
            part = slot[at : at + count]
            if write and piece.tensor is not None:
                gather.fill(piece.tensor, piece.dtype, piece_offset, part)
            if checksum:
                behind = piece.nbytes - piece_offset - count
                sums[number] ^= crc64.shift(crc64.raw(np.frombuffer(part, np.uint8)), behind)
            if not write and isinstance(piece.tensor, torch.Tensor):
                gather.drain(piece.tensor, piece.dtype, piece_offset, part)
            done += count
        if write:
            slot[used:] = bytes(length - used)
            _write_block(files, file, offset, slot)
            if durable:
                start_writeback(files[file], offset, length)
        tick(done)
    finished = (crc64.finish(value, piece.nbytes) for value, piece in zip(sums, pieces)) if checksum else ()
    return Transfer(tuple(finished), (False,) * len(files), BLOCK_BYTES, pinned=False)


def _each(blocks: Blocks) -> Iterator[tuple[int, int, int, list[list[int]]]]:
    """Each block: file, offset, length and its segments, of which the last is the last in the block."""
    rows = blocks.table.tolist()
    for (file, offset, length, first), (*_, behind) in zip(rows, [*rows[1:], [len(blocks.segments)]]):
        yield file, offset, length, blocks.segments[first:behind].tolist()


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
