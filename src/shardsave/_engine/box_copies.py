"""Copies boxes of tensors between two places in host memory, as rows of bytes with strides, many in one call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from shardsave._common import backend

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Source, destination, run; inner count and strides (source, destination); outer count and strides. All in bytes.
Row = tuple[int, int, int, int, int, int, int, int, int]


@lru_cache(maxsize=1 << 14)
def rows(sizes: Sequence[int], source: Sequence[int], destination: Sequence[int], item: int) -> tuple[Row, ...]:
    """The rows that copy a box of ``sizes``, with addresses that count from its first element; one row for most boxes.

    ``source``, ``destination``: the strides there. They and ``item``, the size of an element, are in bytes.
    """
    if math.prod(sizes) == 0:
        return ()
    run = item
    levels: list[tuple[int, int, int]] = []
    for count, here, there in zip(reversed(sizes), reversed(source), reversed(destination)):
        if count == 1:
            continue
        if not levels and here == there == run:
            run *= count
        elif levels and (here, there) == (levels[-1][1] * levels[-1][0], levels[-1][2] * levels[-1][0]):
            levels[-1] = levels[-1][0] * count, *levels[-1][1:]
        else:
            levels.append((count, here, there))
    levels.sort(key=lambda level: -level[0])  # a row has the two levels with the most steps
    inner, outer, *others = [*levels, (1, 0, 0), (1, 0, 0)][: max(2, len(levels))]
    if inner[1] + inner[2] > outer[1] + outer[2] and outer[0] > 1:
        inner, outer = outer, inner  # neighbours in memory one after another
    found = []
    for steps in product(*(range(count) for count, _, _ in others)):
        here = sum(step * stride for step, (_, stride, _) in zip(steps, others))
        there = sum(step * stride for step, (_, _, stride) in zip(steps, others))
        found.append((here, there, run, *inner, *outer))
    return tuple(found)


def copy(table: NDArray[np.int64]) -> None:
    """Copies what the `Row`s of ``table`` say, whose addresses must be valid. Other threads run meanwhile."""
    if backend.native is not None:
        backend.native.copy_boxes(table)
        return
    for source, destination, run, *levels in table.tolist():
        here = _bytes_at(source, run, levels[0], levels[1], levels[3], levels[4])
        _bytes_at(destination, run, levels[0], levels[2], levels[3], levels[5])[...] = here


def _bytes_at(address: int, run: int, inner: int, inner_stride: int, outer: int, outer_stride: int) -> NDArray[np.uint8]:
    reach = run + (inner - 1) * inner_stride + (outer - 1) * outer_stride
    memory = memoryview((ctypes.c_uint8 * reach).from_address(address))
    array: NDArray[np.uint8] = np.ndarray((outer, inner, run), np.uint8, memory, 0, (outer_stride, inner_stride, 1))
    return array
