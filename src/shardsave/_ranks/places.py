"""Where in this rank's memory a range of a spread tensor goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardsave._common.assembled import Chunk
from shardsave._common.sources import ByteRange, ByteSource, TensorSource
from shardsave._common.spread import Spread


def place_of(spread: Spread, begin: int, end: int) -> ByteSource:
    """What receives bytes ``begin`` to ``end`` of ``spread``: straight into its memory, if this rank holds all of them in one piece."""
    for chunk in spread.local:
        first = _begin_of_run(chunk, spread.shape)
        if first is not None:
            start = first * spread.dtype.itemsize
            source = TensorSource(chunk.tensor, spread.dtype)
            if start <= begin and end <= start + source.nbytes:
                return ByteRange(source, begin - start, end - begin)
    return ByteRange(spread, begin, end - begin)


def _begin_of_run(chunk: Chunk, shape: Sequence[int]) -> int | None:
    """The number in C order of the first element of ``chunk``, a box of a tensor of ``shape``; None if others come between its own."""
    sizes = chunk.tensor.shape
    dim = len(shape)
    while dim and sizes[dim - 1] == shape[dim - 1]:
        dim -= 1
    if math.prod(sizes[: max(dim - 1, 0)]) != 1:
        return None
    return sum(at * math.prod(shape[d + 1 :]) for d, at in enumerate(chunk.begin))
