"""Moving a part of any tensor to or from the engine's memory through torch: any layout, device and dtype.

The part is a range of the tensor's *file representation*: elements of the file's dtype in C order. It is cut into a few
boxes of whole rows, each one copy, so a temporary is never larger than the part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from shardsave._common.assembled import Assembled, Memory

#: dtypes that torch can hold but hardly compute with are copied as integers of their size.
_AS_INTEGER = {1: torch.uint8, 2: torch.int16}


def fill(tensor: Memory, dtype: torch.dtype, offset: int, view: memoryview) -> None:
    """Writes the ``len(view)`` bytes that follow ``offset`` in ``tensor``'s file representation into ``view``.

    Casts to ``dtype`` as ``Tensor.copy_`` does.
    """
    with torch.no_grad():
        for box, at in _boxes(tensor, dtype, offset, len(view)):
            slot = _slot(view, dtype, at, box)
            for source, part in box.over(slot) if isinstance(box, Assembled) else ((box, slot),):
                resolved, target = _comparable(_aligned(source).resolve_conj().resolve_neg(), part)
                target.copy_(resolved)


def drain(tensor: torch.Tensor, dtype: torch.dtype, offset: int, view: memoryview) -> None:
    """Writes ``view``, elements of ``dtype``, into ``tensor`` from ``offset`` bytes of its file representation on.

    Casts to the tensor's own dtype as ``Tensor.copy_`` does.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        for box, at in _boxes(tensor, dtype, offset, len(view)):
            assert isinstance(box, torch.Tensor)
            slot = _slot(view, dtype, at, box)
            target, source = _comparable(box, slot) if box.dtype == dtype else (box, slot)
            target.copy_(source)


def _slot(view: memoryview, dtype: torch.dtype, at: int, box: Memory) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8, count=box.numel() * dtype.itemsize, offset=at).view(dtype).view(box.shape)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy of it where it lies in a mapped file at an address that its dtype does not allow."""
    if tensor.data_ptr() % tensor.element_size() == 0:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    copy.reshape(-1).view(torch.uint8).copy_(tensor.reshape(-1).view(torch.uint8))
    return copy


def _comparable(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as integers where their common dtype has no copy kernel of its own."""
    integer = _AS_INTEGER.get(left.element_size())
    if left.dtype == right.dtype and integer is not None and left.dtype not in (torch.bool, integer):
        return left.view(integer), right.view(integer)
    return left, right


def _boxes(tensor: Memory, dtype: torch.dtype, offset: int, length: int) -> Iterator[tuple[Memory, int]]:
    """The views of ``tensor`` that make up a range of bytes, each with its place in the range (bytes)."""
    item = dtype.itemsize
    if offset % item or length % item:
        raise ValueError(f"range of {length} bytes at {offset} cuts an element of {item} bytes")
    start, stop = offset // item, (offset + length) // item
    if start == stop:
        return
    for box, first in _rows(tensor.detach(), start, stop):
        yield box, (first - start) * item


def _rows(tensor: Memory, start: int, stop: int, base: int = 0) -> Iterator[tuple[Memory, int]]:
    """Boxes that cover elements ``start`` to ``stop`` in C order, and the number of the first element of each."""
    if tensor.dim() == 0 or (start == 0 and stop == tensor.numel()):
        yield tensor, base
        return
    row = tensor[0].numel()
    first, into = divmod(start, row)
    last, rest = divmod(stop, row)
    if first == last:
        yield from _rows(tensor[first], into, rest, base + first * row)
        return
    if into:
        yield from _rows(tensor[first], into, row, base + first * row)
        first += 1
    if first < last:
        yield tensor[first:last], base + first * row
    if rest:
        yield from _rows(tensor[last], 0, rest, base + last * row)
