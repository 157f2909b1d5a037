"""The engine without the extension: one buffer, numpy and torch. Byte for byte what the C++ engine makes, and its oracle."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import numpy as np
import torch

from shardsave import _crc64, _lend
from shardsave._engine import BLOCK_BYTES, Piece, Tick, Transfer, TransferFault
from shardsave._files import start_writeback
from shardsave._plan import Block


def run(
    write: bool,
    files: Sequence[int],
    blocks: Sequence[Block],
    pieces: Sequence[Piece],
    checksum: bool,
    durable: bool,
    tick: Tick,
) -> Transfer:
    """As `shardsave._engine.write` and `read`, always through the page cache."""
    sums = [0] * len(pieces)
    done = 0
    try:
        staging = np.empty(BLOCK_BYTES, np.uint8).data
    except MemoryError as error:
        raise TransferFault(-1, "allocation of staging memory", errno.ENOMEM, 0, BLOCK_BYTES) from error
    for block in blocks:
        slot = staging[: block.length]
        if not write:
            _read_block(files, block, slot)
        for segment in block.segments:
            piece = pieces[segment.piece]
            part = slot[segment.at : segment.at + segment.length]
            if write and piece.tensor is not None:
                _lend.fill(piece.tensor, piece.dtype, segment.piece_offset, part)
            if checksum:
                behind = piece.nbytes - segment.piece_offset - segment.length
                sums[segment.piece] ^= _crc64.shift(_crc64.raw(np.frombuffer(part, np.uint8)), behind)
            if not write and isinstance(piece.tensor, torch.Tensor):
                _lend.drain(piece.tensor, piece.dtype, segment.piece_offset, part)
            done += segment.length
        if write:
            slot[_end(block) :] = bytes(block.length - _end(block))
            _write_block(files, block, slot)
            if durable:
                start_writeback(files[block.file], block.offset, block.length)
        tick(done)
    finished = (_crc64.finish(value, piece.nbytes) for value, piece in zip(sums, pieces)) if checksum else ()
    return Transfer(tuple(finished), (False,) * len(files), BLOCK_BYTES, pinned=False)


def _end(block: Block) -> int:
    return max(segment.at + segment.length for segment in block.segments)


def _write_block(files: Sequence[int], block: Block, slot: memoryview) -> None:
    done = 0
    while done < block.length:
        try:
            done += os.pwrite(files[block.file], slot[done:], block.offset + done)
        except OSError as error:
            raise TransferFault(block.file, "pwrite", error.errno or 0, block.offset + done, block.length - done) from error


def _read_block(files: Sequence[int], block: Block, slot: memoryview) -> None:
    """Reads at least what the segments need; the padding may lie beyond the end of the file."""
    done, needed = 0, _end(block)
    while done < needed:
        try:
            count = os.preadv(files[block.file], [slot[done:]], block.offset + done)
        except OSError as error:
            raise TransferFault(block.file, "pread", error.errno or 0, block.offset + done, block.length - done) from error
        if count == 0:
            raise TransferFault(block.file, "pread", 0, block.offset + done, needed - done, "the file ends here")
        done += count
