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
from numpy.typing import NDArray

from shardsave._common.layouts import Extent
from shardsave._common.sources import ByteSource
from shardsave._engine.checksums import checksums
from shardsave._engine.row_sums import row_sums
from shardsave._format.crc64 import raw_sums_of, shifted
from shardsave._ranks.shares import element_strides

#: The most bytes that are summed in one call.
_STEP = 1 << 20


class Runs(NamedTuple):
    """The bytes of a box in the tensor: runs of ``length`` bytes. ``levels``: how many there are, and how many bytes apart they begin, from
    the outermost dimension on; none if there is one run. ``after``: the bytes of the tensor that follow the last run."""

    length: int
    levels: tuple[tuple[int, int], ...]
    after: int

    @property
    def last(self) -> int:
        """Where the last run ends, in bytes from the beginning of the first one."""
        return sum((size - 1) * stride for size, stride in self.levels) + self.length


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
    in_one = [number for number, part in enumerate(parts) if not part.runs.levels]
    unknown = [number for number in in_one if parts[number].checksum is None]
    computed = dict(zip(unknown, checksums([parts[number].source for number in unknown], workers=workers, check=check)))
    known = np.array([computed.get(number, parts[number].checksum) for number in in_one], np.uint64)
    lengths = np.array([parts[number].runs.length for number in in_one], np.int64)
    numbers, after = [in_one], [[parts[number].runs.after for number in in_one]]
    raw_sums = [raw_sums_of(known, lengths)]
    for lines in _lines(parts):
        check()
        table = np.array(lines, np.int64)
        numbers.append(table[:, 0].tolist())
        after.append(table[:, 1].tolist())
        raw_sums.append(row_sums(table[:, 2:]))
    sums = np.zeros(len(parts), np.uint64)
    shares = shifted(np.concatenate(raw_sums), np.array([*itertools.chain(*after)], np.int64))
    np.bitwise_xor.at(sums, [*itertools.chain(*numbers)], shares)
    return sums


class _Line(NamedTuple):
    """Some runs of the part with this ``number``, which are ``rows`` in memory, for `row_sums`. ``after``: the bytes of the tensor that
    follow the last of them."""

    number: int
    after: int
    address: int
    rows: int
    length: int
    step: int


def _lines(parts: Sequence[Summand]) -> Iterator[list[_Line]]:
    """All runs of those of ``parts`` that have several, about `_STEP` bytes at a time; addresses are valid until the next are asked for."""
    lines: list[_Line] = []
    nbytes = 0
    buffer = np.empty(0, np.uint8)
    for number, (source, runs, _) in enumerate(parts):
        if not runs.levels:
            continue
        place, local = source.memory(), 0
        in_memory = place is not None and place[0] < 0
        for rows, length, step, end in _steps(runs):
            if place is not None and in_memory:
                address = place[1] + local
            else:
                buffer = buffer if buffer.size else np.empty(_STEP, np.uint8)
                source.gather(local, buffer[: rows * length].data)
                address = buffer.ctypes.data
            lines.append(_Line(number, runs.last - end + runs.after, address, rows, length, step))
            local += rows * length
            nbytes += rows * length
            if nbytes >= _STEP or not in_memory:
                yield lines
                lines, nbytes = [], 0
    if lines:
        yield lines


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
