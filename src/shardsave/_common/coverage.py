"""Whether boxes cover an array once: what distributed savers wrote in several chunks must have each element in exactly one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: The index at which a box begins, and its sizes.
Extent = tuple[Sequence[int], Sequence[int]]


def covered_once(shape: Sequence[int], boxes: Sequence[Extent]) -> bool:
    """Whether each element is in exactly one of ``boxes``. Counts on the grid of the boxes' borders, which has few cells."""
    if math.prod(shape) == 0:
        return True
    filled = [(begin, sizes) for begin, sizes in boxes if math.prod(sizes)]
    borders = [
        sorted({0, n, *(begin[d] for begin, _ in filled), *(begin[d] + sizes[d] for begin, sizes in filled)})
        for d, n in enumerate(shape)
    ]
    if math.prod(len(cuts) - 1 for cuts in borders) > max(1 << 20, 4 * len(filled)):
        return False
    counts = np.zeros([len(cuts) - 1 for cuts in borders], np.int32)
    numbers = [{cut: cell for cell, cut in enumerate(cuts)} for cuts in borders]
    for begin, sizes in filled:
        counts[tuple(slice(cells[b], cells[b + n]) for cells, b, n in zip(numbers, begin, sizes))] += 1
    return bool((counts == 1).all())
