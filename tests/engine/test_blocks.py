"""Blocks hold every byte of every piece once, in whole elements, in aligned ranges of bounded length."""

from __future__ import annotations

import random

import numpy as np
import pytest

from shardsave._engine.blocks import Blocks, blocks, interleaved
from shardsave._format.packing import ALIGNMENT


def extents(seed: int) -> list[tuple[int, int, int, int]]:
    """Where pieces lie, sorted: neighbours, gaps, empty pieces, bytes that two pieces share, several files."""
    draw = random.Random(seed)
    rows: list[tuple[int, int, int, int]] = []
    file, at = 0, draw.randrange(9000)
    for _ in range(draw.choice((0, 1, 3, 40))):
        if draw.random() < 0.1:
            file, at = file + 1, draw.randrange(9000)
        at += draw.choice((0, 0, 0, 1, ALIGNMENT - 1, ALIGNMENT, 100_000))
        length = 8 * draw.choice((0, 1, 8, 512, draw.randrange(10_000)))
        rows.append((file, at, length, draw.choice((1, 2, 4, 8))))
        at += length if draw.random() < 0.9 else 0
    return rows


@pytest.mark.parametrize("seed", range(200))
def test_every_byte_once(seed: int) -> None:
    """Catches a byte in no segment, or in two; a cut element; a block that is not aligned, too long, or spans a gap."""
    rows, most = extents(seed), ALIGNMENT * (2 + seed % 7)
    plan = blocks(np.array(rows, dtype=np.int64).reshape(-1, 4), most)
    done = [0] * len(rows)
    firsts = [*plan.table[:, 3].tolist(), len(plan.segments)]
    assert firsts == sorted(set(firsts)) and firsts[0] == 0
    for number, (file, offset, length, first) in enumerate(plan.table.tolist()):
        assert offset % ALIGNMENT == length % ALIGNMENT == 0 < length <= most
        end = 0
        for piece, piece_offset, count, at in plan.segments[first : firsts[number + 1]].tolist():
            in_file, begin, _, grain = rows[piece]
            assert (in_file, begin + piece_offset) == (file, offset + at)
            assert piece_offset == done[piece] and count > 0 and piece_offset % grain == 0
            assert end <= at and (end == 0 or at - end < ALIGNMENT)
            done[piece] += count
            end = at + count
        assert length - ALIGNMENT < end <= length
    assert done == plan.piece_bytes.tolist() == [length for _, _, length, _ in rows]


def _blocks_of(plan: Blocks) -> list[tuple[list[int], list[list[int]]]]:
    """Each block: file, offset and length, and its segments."""
    firsts = [*plan.table[:, 3].tolist(), len(plan.segments)]
    return [(row[:3], plan.segments[a:b].tolist()) for row, a, b in zip(plan.table.tolist(), firsts, firsts[1:])]


@pytest.mark.parametrize("seed", range(50))
def test_interleaved(seed: int) -> None:
    """Catches a block that loses its segments when blocks of two tables are mixed, a wrong piece, another order, or one table first."""
    left, right = (blocks(np.array(extents(n), dtype=np.int64).reshape(-1, 4), 4 * ALIGNMENT) for n in (seed, seed + 50))
    mixed, numbers = interleaved(left, right)
    assert mixed.piece_bytes.tolist() == [*left.piece_bytes.tolist(), *right.piece_bytes.tolist()]
    found = _blocks_of(mixed)
    own = [one for one, number in zip(found, numbers.tolist()) if number < 0]
    assert [one for one, number in zip(found, numbers.tolist()) if number >= 0] == _blocks_of(left)
    moved = [(row, [[s[0] - len(left.piece_bytes), *s[1:]] for s in segments]) for row, segments in own]
    assert moved == _blocks_of(right)
    assert numbers[numbers >= 0].tolist() == [*range(len(left.table))]
    half = len(numbers) // 2
    assert abs(int((numbers[:half] >= 0).sum()) - len(left.table) / 2) <= 1
