"""Raw checksums of rows of bytes that lie apart in what is summed, for many boxes in one call."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from shardsave._common import backend
from shardsave._format.crc64 import raw_of_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray


def row_sums(table: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The raw sum for each line of ``table``: the address of rows that follow one another in memory, how many there are, the length of
    each, and how many bytes apart they begin in what is summed; the bytes between them count as zero.

    Addresses must be valid. Other threads run meanwhile.
    """
    if backend.native is not None:
        sums: NDArray[np.uint64] = backend.native.crc64_of_rows(table)
        return sums
    summed = [
        raw_of_rows(np.frombuffer((ctypes.c_uint8 * (rows * length)).from_address(address), np.uint8), rows, step)
        for address, rows, length, step in table.tolist()
    ]
    return np.array(summed, np.uint64)
