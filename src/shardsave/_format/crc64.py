"""CRC-64/NVME in numpy: the fallback for the C++ core, and the oracle in its tests.

A raw sum is the register without initial value and final inversion, as in ``csrc/crc64.h``; it is linear:
``raw(A + B) == shift(raw(A), len(B)) ^ raw(B)``. Parameters of the checksum: NVM Express NVM Command Set Specification,
"64b CRC": polynomial 0xAD93D23594C93659, reflected, initial value and final XOR all ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Union

import numpy as np

from shardsave._common.backend import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = Union[bytes, bytearray, memoryview, NDArray[np.uint8]]

_REFLECTED = 0x9A6C9329AC4BC9B5
_ONES = 0xFFFF_FFFF_FFFF_FFFF
_TOP = 1 << 63  # the polynomial 1 in reflected bit order

#: How many lanes are computed side by side: more lanes need fewer calls of numpy, fewer lanes keep the state in the cache and cost
#: less to join.
_LANES = 4096


def crc64(data: Bytes) -> int:
    """The complete CRC-64/NVME of ``data``."""
    if native is not None:
        return int(native.crc64(data))
    array = np.frombuffer(data, dtype=np.uint8)
    return finish(raw(array), array.size)


def finish(raw_sum: int, nbytes: int) -> int:
    """The standard checksum of ``nbytes`` bytes whose raw sum is ``raw_sum``."""
    return raw_sum ^ shift(_ONES, nbytes) ^ _ONES


def shift(raw_sum: int, nbytes: int) -> int:
    """``raw_sum`` · x^(8·nbytes) mod P: what ``raw_sum`` contributes to a sum if ``nbytes`` more bytes follow."""
    return _multiply(raw_sum, _power(nbytes)) if raw_sum else 0


def joined(first: int, second: int, nbytes: int) -> int:
    """The complete checksum of two runs of bytes with the checksums ``first`` and ``second``; the second run has ``nbytes`` bytes."""
    return shift(first, nbytes) ^ second


def contributions(sums: NDArray[np.uint64], nbytes: NDArray[np.int64], after: NDArray[np.int64]) -> NDArray[np.uint64]:
    """What runs of bytes add to the raw sum of everything: XOR joins them. ``sums``: the complete checksum of each run, ``nbytes``: its
    length, ``after``: how many bytes follow it."""
    return shifted(raw_sums_of(sums, nbytes), after)


def shifted(raw_sums: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """`shift` of each of ``raw_sums``."""
    products: NDArray[np.uint64]
    if native is not None:
        products = native.crc64_shifted(raw_sums, nbytes.astype(np.uint64))
        return products
    ends, of_end = np.unique(nbytes, return_inverse=True)
    powers = np.array([_power(end) for end in ends.tolist()], np.uint64)[of_end]
    products = np.zeros_like(raw_sums)
    one, top = np.uint64(1), np.uint64(63)
    for _ in range(64):
        products ^= powers * (raw_sums >> top)
        raw_sums = raw_sums << one
        powers = (powers >> one) ^ (np.uint64(_REFLECTED) * (powers & one))
    return products


def raw_sums_of(sums: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The raw sums of runs of ``nbytes`` bytes with the complete checksums ``sums``."""
    ones = np.full(len(sums), _ONES, np.uint64)
    return sums ^ shifted(ones, nbytes) ^ ones


def raw_of_rows(data: NDArray[np.uint8], rows: int, step: int) -> int:
    """The raw sum of ``rows`` rows of equal lengths, which follow one another in ``data`` and begin ``step`` bytes apart in what is
    summed; the bytes between them count as zero."""
    total = 0
    for row_sum in _row_sums(data.reshape(rows, -1)).tolist():
        total = shift(total, step) ^ row_sum
    return total


def _row_sums(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The raw sum of each of ``rows``."""
    whole = rows.shape[1] // 8 * 8
    state = _word_sums(rows[:, :whole].copy().view("<u8"))
    table = np.array(_byte_table(), dtype=np.uint64)
    for column in range(whole, rows.shape[1]):
        state = table[((state ^ rows[:, column]) & np.uint64(0xFF)).astype(np.intp)] ^ (state >> np.uint64(8))
    return state


def raw(data: NDArray[np.uint8]) -> int:
    """The raw sum of ``data``, a one-dimensional array of bytes."""
    lane_bytes = data.size // _LANES // 8 * 8
    if lane_bytes < 64:
        return _raw_serial(data)
    bulk = lane_bytes * _LANES
    words = data[:bulk].view("<u8") if data.ctypes.data % 8 == 0 else data[:bulk].copy().view("<u8")
    state = _word_sums(words.reshape(_LANES, lane_bytes // 8))
    return shift(_fold(state, lane_bytes), data.size - bulk) ^ _raw_serial(data[bulk:])


def _word_sums(rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The raw sum of each of ``rows``, as words of eight bytes."""
    state = np.zeros(len(rows), dtype=np.uint64)
    tables = _tables()
    for column in range(rows.shape[1]):
        state ^= rows[:, column]
        parts = state.view(np.uint16).reshape(len(rows), 4)
        state = tables[0][parts[:, 0]] ^ tables[1][parts[:, 1]] ^ tables[2][parts[:, 2]] ^ tables[3][parts[:, 3]]
    return state


def _fold(sums: NDArray[np.uint64], lane_bytes: int) -> int:
    """The raw sum of all lanes, of ``lane_bytes`` bytes each: neighbours are joined pairwise."""
    values = [int(value) for value in sums]
    while len(values) > 1:
        factor = _power(lane_bytes)
        values = [_multiply(values[i], factor) ^ values[i + 1] for i in range(0, len(values), 2)]
        lane_bytes *= 2
    return values[0]


def _raw_serial(data: NDArray[np.uint8]) -> int:
    table = _byte_table()
    state = 0
    for byte in data.tobytes():
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state


@lru_cache(maxsize=1)
def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_REFLECTED if value & 1 else 0)
        table.append(value)
    return table


@lru_cache(maxsize=1)
def _tables() -> tuple[NDArray[np.uint64], ...]:
    """For each of the four 16-bit parts of a word: part → its contribution to the register after the whole word."""
    single = np.array(_byte_table(), dtype=np.uint64)

    def after_zero_byte(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shifted: NDArray[np.uint64] = state >> np.uint64(8)
        shifted ^= single[(state & np.uint64(0xFF)).astype(np.intp)]
        return shifted

    values = np.arange(1 << 16, dtype=np.uint64)
    last = after_zero_byte(after_zero_byte(values))  # bytes 6 and 7 of the word
    tables = [last]
    for _ in range(3):
        tables.append(after_zero_byte(after_zero_byte(tables[-1])))
    return tuple(reversed(tables))


@lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8·nbytes) mod P, reflected."""
    result, square = _TOP, _TOP >> 8
    while nbytes:
        if nbytes & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        nbytes >>= 1
    return result


def _multiply(left: int, right: int) -> int:
    """The product of two reflected polynomials mod P."""
    product = 0
    while left:
        if left & _TOP:
            product ^= right
        left = (left << 1) & _ONES
        right = (right >> 1) ^ (_REFLECTED if right & 1 else 0)
    return product
