"""What the elements of a box add to the raw checksum of the whole tensor, as if all other elements were zero. XOR joins the boxes.

In the tensor, a box is runs of bytes that lie apart. Runs of one length and one distance are summed in one call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shardsave._common.layouts import Extent
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._engine.checksums import checksums
from shardsave._format.crc64 import raw_of_rows, raw_sums_of, shift, shifted
from shardsave._ranks.shares import element_strides

#: The most bytes that are summed in one call.
_STEP = 1 << 20


class Runs(NamedTuple):
    """The bytes of a box in the tensor: runs of ``length`` bytes. ``levels``: how many there are, and how many bytes apart they begin, from
    the outermost dimension on; none if there is one run. ``after``: the bytes of the tensor that follow the last run."""

    length: int
    levels: tuple[tuple[int, int], ...]
    after: int


@lru_cache(maxsize=1 << 14)
def runs_of(shape: tuple[int, ...], itemsize: int, box: Extent) -> Runs:
    """The runs of ``box``, which is not empty, in a tensor of ``shape``."""
    begin, sizes = box
    strides = [stride * itemsize for stride in element_strides(shape)]
    length, dim = itemsize, len(shape)
    while dim and length == strides[dim - 1]:
        dim -= 1
        length *= sizes[dim]
    levels: list[tuple[int, int]] = []
    for size, stride in zip(sizes[:dim], strides[:dim]):
        if levels and levels[-1][1] == size * stride:
            levels[-1] = levels[-1][0] * size, stride
        elif size > 1:
            levels.append((size, stride))
    last = sum((at + size - 1) * stride for at, size, stride in zip(begin, sizes, strides)) + itemsize
    return Runs(length, tuple(levels), math.prod(shape) * itemsize - last)


class Summand(NamedTuple):
    """The elements of a box in a tensor. ``checksum``: of ``source``, if it is known."""

    source: ByteSource
    runs: Runs
    checksum: int | None = None


def box_sums(parts: Sequence[Summand], workers: int | None, check: Callable[[], object]) -> NDArray[np.uint64]:
    """What each of ``parts`` adds to the raw sum of its tensor. ``check`` is called again and again.

    Raises TransferFault, and what ``check`` raises.
    """
    sums = np.zeros(len(parts), np.uint64)
    in_one = [number for number, part in enumerate(parts) if not part.runs.levels]
    if in_one:
        unknown = [number for number in in_one if parts[number].checksum is None]
        computed = dict(zip(unknown, checksums([parts[number].source for number in unknown], workers=workers, check=check)))
        known = [computed.get(number, parts[number].checksum) for number in in_one]
        lengths = np.array([parts[number].runs.length for number in in_one], np.int64)
        sums[in_one] = raw_sums_of(np.array(known, np.uint64), lengths)
    for number, part in enumerate(parts):
        if part.runs.levels:
            sums[number] = _sum_of_runs(part, check)
    return shifted(sums, np.array([part.runs.after for part in parts], np.int64))


def _sum_of_runs(part: Summand, check: Callable[[], object]) -> int:
    """The raw sum of a part with several runs, up to the end of the last one."""
    source, runs, _ = part
    total, last, local = 0, 0, 0
    memory = _memory_of(source)
    buffer = np.empty(min(source.nbytes, _STEP) if memory is None else 0, np.uint8)
    for rows, length, step, end in _steps(runs):
        check()
        nbytes = rows * length
        if memory is not None:
            data = memory[local : local + nbytes]
        else:
            data = buffer[:nbytes]
            source.gather(local, data.data)
        total = shift(total, end - last) ^ raw_of_rows(data, rows, step)
        last, local = end, local + nbytes
    return total


def _steps(runs: Runs) -> Iterator[tuple[int, int, int, int]]:
    """The runs in parts of at most `_STEP` bytes, in order: how many rows, their length, how many bytes apart they begin, and where the
    last one ends, in bytes from the beginning of the first run."""
    *outer, (count, step) = runs.levels
    for place in itertools.product(*(range(0, size * stride, stride) for size, stride in outer)):
        begin = sum(place)
        if runs.length <= _STEP:
            most = _STEP // runs.length
            for first in range(0, count, most):
                rows = min(most, count - first)
                yield rows, runs.length, step, begin + (first + rows - 1) * step + runs.length
        else:
            for at, first in itertools.product(range(0, count * step, step), range(0, runs.length, _STEP)):
                length = min(_STEP, runs.length - first)
                yield 1, length, step, begin + at + first + length


def _memory_of(source: ByteSource) -> NDArray[np.uint8] | None:
    """The bytes of ``source``, if they are in host memory as the file has them."""
    if not isinstance(source, TensorSource) or source.memory() is None or source.cuda_device >= 0:
        return None
    return source.tensor.detach().reshape(-1).view(torch.uint8).numpy()
