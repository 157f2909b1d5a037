"""Moving a part of any tensor to or from the engine's memory through torch: any layout, device and dtype.

The part is a range of the tensor's *file representation*: elements of the file's dtype in C order. It is cut into a few
boxes of whole rows, each one copy, so a temporary is never larger than the part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: dtypes that torch can hold but hardly compute with are copied as integers of their size.
_AS_INTEGER = {1: torch.uint8, 2: torch.int16}


def fill(tensor: torch.Tensor, dtype: torch.dtype, offset: int, view: memoryview) -> None:
    """Writes the ``len(view)`` bytes that follow ``offset`` in ``tensor``'s file representation into ``view``."""
    with torch.no_grad():
        for box, at in _boxes(tensor, dtype, offset, len(view)):
            slot = _slot(view, dtype, at, box)
            source, target = _comparable(box.resolve_conj().resolve_neg(), slot)
            target.copy_(source)


def drain(tensor: torch.Tensor, dtype: torch.dtype, offset: int, view: memoryview) -> None:
    """Writes ``view``, elements of ``dtype``, into ``tensor`` from ``offset`` bytes of its file representation on.

    Casts to the tensor's own dtype as ``Tensor.copy_`` does.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        for box, at in _boxes(tensor, dtype, offset, len(view)):
            slot = _slot(view, dtype, at, box)
            target, source = _comparable(box, slot) if box.dtype == dtype else (box, slot)
            target.copy_(source)


def _slot(view: memoryview, dtype: torch.dtype, at: int, box: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8, count=box.numel() * dtype.itemsize, offset=at).view(dtype).view(box.shape)


def _comparable(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as integers where their common dtype has no copy kernel of its own."""
    integer = _AS_INTEGER.get(left.element_size())
    if left.dtype == right.dtype and integer is not None and left.dtype not in (torch.bool, integer):
        return left.view(integer), right.view(integer)
    return left, right


def _boxes(tensor: torch.Tensor, dtype: torch.dtype, offset: int, length: int) -> Iterator[tuple[torch.Tensor, int]]:
    """The views of ``tensor`` that make up a range of bytes, each with its place in the range (bytes)."""
    item = dtype.itemsize
    if offset % item or length % item:
        raise ValueError(f"range of {length} bytes at {offset} cuts an element of {item} bytes")
    start, stop = offset // item, (offset + length) // item
    if start == stop:
        return
    for box, first in _rows(tensor.detach(), start, stop):
        yield box, (first - start) * item


def _rows(tensor: torch.Tensor, start: int, stop: int, base: int = 0) -> Iterator[tuple[torch.Tensor, int]]:
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
