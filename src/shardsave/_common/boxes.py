"""Splits a range of a tensor's elements into boxes of whole rows. torch copies each box at once, for any strides, device and dtype.

A range counts elements in C order, as a file holds them. Each box is copied straight to its place, so nothing larger than the range
is ever allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

#: Which elements of a tensor: a slice for each of its first dimensions; the other dimensions are whole.
Box = tuple[slice, ...]

#: Element size → an integer dtype: torch has some small dtypes that it cannot copy, so they are copied as integers.
_AS_INTEGER = {1: torch.uint8, 2: torch.int16}


def box(begin: Sequence[int], sizes: Sequence[int]) -> Box:
    """The box of ``sizes`` that begins at index ``begin``."""
    return tuple(slice(at, at + size) for at, size in zip(begin, sizes))


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that cover elements ``start`` to ``stop``, in C order: at most two for each dimension."""
    if start == stop:
        return
    if not shape or (start == 0 and stop == math.prod(shape)):
        yield ()
        return
    row = math.prod(shape[1:])
    first, begin = divmod(start, row)
    last, end = divmod(stop, row)
    if first == last:
        yield from _within(first, shape, begin, end)
        return
    if begin:
        yield from _within(first, shape, begin, row)
        first += 1
    if first < last:
        yield (slice(first, last),)
    if end:
        yield from _within(last, shape, 0, end)


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, stop):
        yield (slice(row, row + 1), *box)


def boxes_in_file(
    shape: Sequence[int], dtype: torch.dtype, offset: int, view: memoryview
) -> Iterator[tuple[Box, torch.Tensor]]:
    """The boxes of the ``len(view)`` bytes from ``offset`` on of a tensor in a file, each with a tensor over its bytes in ``view``."""
    item = dtype.itemsize
    if offset % item or len(view) % item:
        raise ValueError(f"range of {len(view)} bytes at {offset} cuts an element of {item} bytes")
    at = 0
    for box in boxes(shape, offset // item, (offset + len(view)) // item):
        sizes = (*(rows.stop - rows.start for rows in box), *shape[len(box) :])
        nbytes = math.prod(sizes) * item
        yield box, torch.frombuffer(view, dtype=torch.uint8, count=nbytes, offset=at).view(dtype).view(sizes)
        at += nbytes


def copy_out(elements: torch.Tensor, target: torch.Tensor) -> None:
    """Copies ``elements`` of a tensor to ``target`` in staging memory, cast as `Tensor.copy_` does."""
    source, target = _comparable(aligned(elements).resolve_conj().resolve_neg(), target)
    target.copy_(source)


def copy_in(source: torch.Tensor, elements: torch.Tensor) -> None:
    """Copies ``source`` in staging memory to ``elements`` of a tensor, cast as `Tensor.copy_` does."""
    source, elements = _comparable(source, elements)
    elements.copy_(source)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy of it if it is in a mapped file at an address that its dtype does not allow."""
    if tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    copy.reshape(-1).view(torch.uint8).copy_(tensor.reshape(-1).view(torch.uint8))
    return copy


def _comparable(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as integers if their common dtype has no copy kernel of its own."""
    integer = _AS_INTEGER.get(left.element_size())
    if left.dtype == right.dtype and integer is not None and left.dtype not in (torch.bool, integer):
        return left.view(integer), right.view(integer)
    return left, right
