"""Compares stored tensors of two checkpoints: whether their bytes are equal, and by how much their values differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from numpy.typing import NDArray

from shardsave._format.dtypes import BY_NAME
from shardsave._loading.stored_bytes import stream
from shardsave._storage.checkpoint import Checkpoint, Located

#: How many elements of each side are in memory at a time.
_PIECE_ELEMENTS = 1 << 18

Values = Union[NDArray[np.float64], NDArray[np.complex128], NDArray[np.int64], NDArray[np.uint64]]

_PLAIN = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_WIDE = {"b": "i8", "i": "i8", "u": "i8", "f": "f8", "c": "c16"}

#: The values of the eight positive codes of F4 (OCP Microscaling Formats, E2M1); the other eight are their negatives.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Difference(NamedTuple):
    """How two sequences of values a and b differ.

    ``elements``: how many values differ. ``nans``: how many of these are NaN on one side only; the maxima ignore them.
    ``max_absolute``: the largest |a - b|. ``max_relative``: the largest |a - b| / max(|a|, |b|), at most 2, or infinite
    if |a - b| is infinite.
    """

    elements: int = 0
    nans: int = 0
    max_absolute: float = 0.0
    max_relative: float = 0.0

    def joined(self, other: Difference) -> Difference:
        """The difference over both: the values of this one and the values of ``other``."""
        return Difference(
            self.elements + other.elements,
            self.nans + other.nans,
            max(self.max_absolute, other.max_absolute),
            max(self.max_relative, other.max_relative),
        )


def must_read(left: Located, right: Located) -> bool:
    """Whether two stored tensors must be read to learn how they differ: not if shapes differ, or dtypes and checksums are equal."""
    if left.shape != right.shape or 0 in left.shape:
        return False
    return left.dtype != right.dtype or left.checksum is None or left.checksum != right.checksum


def compare_stored(
    left: tuple[Checkpoint, Located], right: tuple[Checkpoint, Located], tick: Callable[[int], object]
) -> Difference | None:
    """The difference of two stored tensors of one shape; None if dtype and bytes are equal. Both are read piece by piece.

    ``tick`` is called after each piece with the bytes read so far, of both sides together.
    """
    a_dtype, b_dtype = left[1].dtype, right[1].dtype
    difference, equal, done = Difference(), a_dtype == b_dtype, 0
    pieces = zip(
        stream(*left, _PIECE_ELEMENTS), stream(*right, _PIECE_ELEMENTS), strict=True
    )  # strict: both streams must end, since they then verify their checksum
    for a, b in pieces:
        if a_dtype != b_dtype or a != b:
            equal = False
            difference = difference.joined(compare(a, a_dtype, b, b_dtype))
        done += len(a) + len(b)
        tick(done)
    return None if equal else difference


def compare(left: bytes, left_dtype: str, right: bytes, right_dtype: str) -> Difference:
    """Compares two sequences of equally many values. Dtypes are named as in safetensors. NaN equals NaN, and 0.0 equals -0.0."""
    a, b = _values(left, left_dtype), _values(right, right_dtype)
    if a.dtype != b.dtype:
        wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
        a, b = a.astype(wide), b.astype(wide)
    with np.errstate(all="ignore"):
        return _compare_floats(a, b) if a.dtype.kind in "fc" else _compare_integers(a, b)


def _compare_floats(a: Values, b: Values) -> Difference:
    a_nan, b_nan = np.isnan(a), np.isnan(b)
    equal = (a == b) | (a_nan & b_nan)
    nans = int(np.count_nonzero(a_nan != b_nan))
    absolute = np.abs(a - b)
    absolute[equal | a_nan | b_nan] = 0
    relative = absolute / np.maximum(np.abs(a), np.abs(b))
    relative[absolute == 0] = 0
    relative[np.isinf(absolute)] = np.inf
    return Difference(equal.size - int(np.count_nonzero(equal)), nans, _largest(absolute), _largest(relative))


def _compare_integers(a: Values, b: Values) -> Difference:
    """The difference is exact: the larger minus the smaller may not fit into a signed integer, but always fits into an unsigned one."""
    absolute = (np.maximum(a, b) - np.minimum(a, b)).view(np.uint64).astype(np.float64)
    relative = absolute / np.maximum(np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
    relative[absolute == 0] = 0
    return Difference(int(np.count_nonzero(absolute)), 0, _largest(absolute), _largest(relative))


def _largest(values: NDArray[Any]) -> float:
    return float(values.max(initial=0.0))


def _values(data: bytes, dtype: str) -> Values:
    raw = np.frombuffer(data, np.uint8)
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F4":
        return _table("F4")[np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)]
    if dtype not in _PLAIN:
        return _table(dtype)[raw]
    plain = raw.view(_PLAIN[dtype])
    return plain if dtype == "U64" else plain.astype(_WIDE[plain.dtype.kind])


@lru_cache
def _table(dtype: str) -> NDArray[np.float64]:
    """The value of each code of a dtype with at most eight bits."""
    if dtype == "F4":
        return np.array([*_E2M1, *(-value for value in _E2M1)])
    codes = torch.arange(256, dtype=torch.uint8, device="cpu").view(BY_NAME[dtype].torch)
    return codes.to(torch.float32).numpy().astype(np.float64)
