"""Copies of boxes between places in memory, against numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from shardsave._engine import box_copies


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("engine_name")
def test_against_numpy(seed: int) -> None:
    """Catches an element that goes to another place, for any box, dtype, order of dimensions and alignment; and one outside the box."""
    draw = random.Random(seed)
    dims = draw.randrange(5)
    sizes = tuple(draw.choice((1, 2, 3, 7, 40 if dims < 3 else 4)) for _ in range(dims))
    item = draw.choice((1, 2, 4, 8, 16))
    dtype = np.dtype(f"V{item}")

    def place() -> tuple[np.ndarray, np.ndarray]:
        """A box of ``sizes`` within a larger array whose dimensions are in any order in memory; and all bytes of that."""
        order = draw.sample(range(dims), dims)
        whole = [size + draw.choice((0, 0, 2)) for size in sizes]
        nbytes = int(np.prod(whole, dtype=int)) * item
        memory = np.frombuffer(np.random.default_rng(seed).bytes(nbytes + 3), np.uint8).copy()[draw.randrange(3) :][:nbytes]
        array = np.ndarray([whole[d] for d in order], dtype, memory).transpose(np.argsort(order) if dims else None)
        return array[(..., *(slice(n - size, n) for n, size in zip(whole, sizes)))], memory

    source, _ = place()
    target, memory = place()
    expected, box = memory.copy(), target
    found = box_copies.rows(sizes, source.strides, target.strides, item)
    here, there = (array.__array_interface__["data"][0] for array in (source, box))
    table = np.array([(here + row[0], there + row[1], *row[2:]) for row in found], dtype=np.int64).reshape(-1, 9)
    box_copies.copy(table)
    assert np.array_equal(np.ascontiguousarray(box).view(np.uint8), np.ascontiguousarray(source).view(np.uint8))
    np.ndarray(box.shape, dtype, expected, there - memory.__array_interface__["data"][0], box.strides)[...] = source
    assert np.array_equal(memory, expected)


def test_most_boxes_are_one_row() -> None:
    """Catches copies that cost a row for each line of a box."""
    assert len(box_copies.rows((1000, 50), (400, 4), (200, 4), 4)) == 1
    assert box_copies.rows((1000, 50), (200, 4), (200, 4), 4) == ((0, 0, 200_000, 1, 0, 0, 1, 0, 0),)
    assert box_copies.rows((3, 0), (0, 4), (0, 4), 4) == ()
