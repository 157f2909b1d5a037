"""Checksums of stored tensors that several ranks have read in parts: the parts are joined, and compared with what is stored.

CRCs are linear: the parts of a tensor, each shifted by the bytes that follow it, and the stored sum cancel out by XOR if the bytes are
right. Each rank adds up what it has of all tensors, each multiplied by a factor of its own, so that nearly always eight bytes from each
rank show that nothing is damaged. Multiplied in GF(2^64): errors that differ cannot cancel out, but for a chance of 2^-64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardsave._format.crc64 import contributions, finish

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.read_plan import Range
    from shardsave._ranks.session import Session

    Sums = NDArray[np.uint64]

#: x^64 = x^4 + x^3 + x + 1 in GF(2^64).
_REDUCTION = np.uint64(0x1B)
_ONE, _TOP = np.uint64(1), np.uint64(63)

#: If something is damaged, the sums of this many groups of tensors are compared, and then those of the tensors in damaged groups.
_GROUPS = 1024


class JoinedSums:
    """The sums of ``count`` stored tensors, of which this rank has read some ranges of bytes."""

    def __init__(self, count: int) -> None:
        self._parts = np.zeros(count, np.uint64)

    def add(self, ranges: Sequence[Range], nbytes: Sequence[int], sums: Sequence[int]) -> None:
        """Adds the complete checksums of ``ranges``. ``nbytes``: the length of the tensor to which each belongs."""
        if not ranges:
            return
        numbers, begins, ends = np.array(ranges, np.int64).T
        after = np.array(nbytes, np.int64) - ends
        np.bitwise_xor.at(self._parts, numbers, contributions(np.array(sums, np.uint64), ends - begins, after))

    def expect(self, number: int, checksum: int, nbytes: int) -> None:
        """The tensor has this stored checksum. One rank says so for each tensor."""
        self._parts[number] ^= np.uint64(finish(checksum, nbytes))  # `finish` is its own inverse

    def differences(self, session: Session, ignored: Sequence[int]) -> dict[int, int]:
        """Number of a damaged tensor → the XOR of what was stored and what was read. Equal on all ranks.

        ``ignored``: the tensors of which this rank counts nothing.
        """
        self._parts[list(ignored)] = 0
        numbers = np.arange(len(self._parts), dtype=np.uint64)
        products = times(self._parts, factors(numbers))
        if not _joined(session, "sums of all tensors", np.bitwise_xor.reduce(products, keepdims=True)).any():
            return {}
        groups = np.zeros(_GROUPS, np.uint64)
        of_group = (numbers % np.uint64(_GROUPS)).astype(np.int64)
        np.bitwise_xor.at(groups, of_group, products)
        damaged = np.flatnonzero(_joined(session, "sums of groups of tensors", groups))
        suspects = np.flatnonzero(np.isin(of_group, damaged))
        differences = _joined(session, "sums of tensors", self._parts[suspects])
        return {int(suspects[n]): int(differences[n]) for n in np.flatnonzero(differences)}


def _joined(session: Session, what: str, mine: Sums) -> Sums:
    """The XOR of ``mine`` over all ranks."""
    gathered = session.gather(what, mine.astype("<u8").tobytes())
    total = None
    if gathered is not None:
        rows = np.stack([np.frombuffer(one, "<u8") for one in gathered])
        total = np.bitwise_xor.reduce(rows, axis=0).tobytes()
    return np.frombuffer(session.publish(what, total), "<u8").astype(np.uint64)


def factors(numbers: Sums) -> Sums:
    """A factor for each number, which looks random (splitmix64)."""
    mixed = (numbers + _ONE) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    factors: Sums = mixed ^ (mixed >> np.uint64(31))
    return factors


def times(left: Sums, right: Sums) -> Sums:
    """Products in GF(2^64)."""
    left, right, product = left.copy(), right.copy(), np.zeros_like(left)
    while right.any():
        product ^= left * (right & _ONE)
        left = (left << _ONE) ^ (_REDUCTION * (left >> _TOP))
        right >>= _ONE
    return product
