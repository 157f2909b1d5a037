"""Copies the parts of a block between local tensors, windows and parcels."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box, copy_in, copy_out
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.spread import Spread
from shardsave._engine import box_copies
from shardsave._engine.box_copies import Row
from shardsave._ranks.parts import Part, element_strides

#: Where bytes go: into a window or a parcel, or out of it into local tensors.
Way = Literal["in", "out"]


class Local:
    """The local boxes of tensors, from which parts are copied (``way`` "in") or into which ("out")."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._plain: dict[int, tuple[Spread, list[_Plain | None]]] = {}

    def copy(self, parts: Iterable[Part], address: int, *, packed: bool = False) -> int:
        """Copies ``parts`` to or from the block at ``address``, or the parcel that they make up. Returns the number of bytes."""
        rows: list[Row] = []
        others: list[tuple[Part, Chunk, int]] = []
        done = 0
        for part in parts:
            tensor, begin, sizes, at = part
            number = holding(tensor, begin, sizes)
            chunk = tensor.local[number]
            plain = self._of(tensor)[number]
            place = address + (done if packed else at)
            done += part.nbytes
            if plain is None:
                others.append((part, chunk, place))
                continue
            here = plain.address + sum((a - b) * stride for a, b, stride in zip(begin, chunk.begin, plain.strides))
            there = byte_strides(sizes if packed else tensor.layout.shape, tensor.dtype.itemsize)
            if self._way == "in":
                found = box_copies.rows(sizes, plain.strides, there, tensor.dtype.itemsize)
                rows += [(here + row[0], place + row[1], *row[2:]) for row in found]
            else:
                found = box_copies.rows(sizes, there, plain.strides, tensor.dtype.itemsize)
                rows += [(place + row[0], here + row[1], *row[2:]) for row in found]
        _copy(rows)
        for part, chunk, place in others:
            self._copy_other(part, chunk, place, packed=packed)
        return done

    def _of(self, tensor: Spread) -> list[_Plain | None]:
        known = self._plain.get(id(tensor))
        if known is None:
            known = self._plain[id(tensor)] = tensor, [_Plain.of(chunk.tensor, tensor.dtype) for chunk in tensor.local]
        return known[1]

    def _copy_other(self, part: Part, chunk: Chunk, place: int, *, packed: bool) -> None:
        """By torch, through memory of its own: for tensors on a device, of another dtype or of a class that hides where its data is."""
        tensor, begin, sizes, _ = part
        inside = box([a - b for a, b in zip(begin, chunk.begin)], sizes)
        staged = torch.empty(sizes, dtype=tensor.dtype, device="cpu")
        there = byte_strides(sizes if packed else tensor.layout.shape, tensor.dtype.itemsize)
        own = byte_strides(sizes, tensor.dtype.itemsize)
        with torch.no_grad():
            elements = chunk.tensor.detach()[inside]
            if self._way == "in":
                copy_out(elements, staged)
                rows = box_copies.rows(sizes, own, there, tensor.dtype.itemsize)
                _copy([(staged.data_ptr() + row[0], place + row[1], *row[2:]) for row in rows])
            else:
                rows = box_copies.rows(sizes, there, own, tensor.dtype.itemsize)
                _copy([(place + row[0], staged.data_ptr() + row[1], *row[2:]) for row in rows])
                copy_in(staged, elements)


class _Plain:
    """A tensor in host memory whose elements are those of the file. ``strides`` are in bytes."""

    __slots__ = ("address", "strides")

    def __init__(self, address: int, strides: tuple[int, ...]) -> None:
        self.address = address
        self.strides = strides

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype) -> _Plain | None:
        """None if torch has to copy ``tensor``."""
        if type(tensor) not in PLAIN_TYPES or not tensor.is_cpu or tensor.dtype != dtype or tensor.layout is not torch.strided:
            return None
        if tensor.is_conj() or tensor.is_neg():
            return None
        item = dtype.itemsize
        return cls(tensor.data_ptr(), tuple(stride * item for stride in tensor.stride()))


def copy_parcel(parts: Iterable[Part], window: int, parcel: int, way: Way) -> None:
    """Copies the ``parcel`` that ``parts`` make up into the ``window`` of their block, or out of it. Both are addresses."""
    rows: list[Row] = []
    for part in parts:
        item = part.tensor.dtype.itemsize
        packed, spread = byte_strides(part.sizes, item), byte_strides(part.tensor.layout.shape, item)
        at = window + part.at
        if way == "in":
            rows += [(parcel + row[0], at + row[1], *row[2:]) for row in box_copies.rows(part.sizes, packed, spread, item)]
        else:
            rows += [(at + row[0], parcel + row[1], *row[2:]) for row in box_copies.rows(part.sizes, spread, packed, item)]
        parcel += part.nbytes
    _copy(rows)


def _copy(rows: list[Row]) -> None:
    if rows:
        box_copies.copy(np.array(rows, dtype=np.int64))


def holding(tensor: Spread, begin: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """The number of the local chunk that holds a box."""
    for number, chunk in enumerate(tensor.local):
        if all(b <= a and a + n <= b + m for a, n, b, m in zip(begin, sizes, chunk.begin, chunk.tensor.shape)):
            return number
    raise AssertionError(f"no local chunk holds the box of {sizes} at {begin}")


@lru_cache(maxsize=1 << 12)
def byte_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    """The strides of ``shape`` in C order, in bytes."""
    return tuple(stride * item for stride in element_strides(shape))
