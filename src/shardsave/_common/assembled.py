"""A tensor whose bytes lie in several places, as distributed savers leave them behind: cut like a tensor, never put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Union

import torch


class Part(NamedTuple):
    """A box of the whole: where it begins in each dimension, and its elements."""

    begin: tuple[int, ...]
    tensor: torch.Tensor


class Assembled:
    """A tensor on the CPU made of ``parts``, which cover each of its elements once.

    ``copied`` is told of how many bytes were copied out of them, on whatever thread does so.
    """

    is_cpu, is_cuda, requires_grad = True, False, False

    def __init__(
        self, dtype: torch.dtype, shape: Sequence[int], parts: Sequence[Part], copied: Callable[[int], None] | None = None
    ) -> None:
        self.copied = copied
        self.dtype = dtype
        self.shape = torch.Size(shape)
        self.parts = tuple(parts)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def detach(self) -> Assembled:
        return self

    def __getitem__(self, index: int | slice) -> Assembled:
        """A row, or the rows from ``index.start`` to ``index.stop``; both are numbers that the tensor has."""
        first, stop = (index, index + 1) if isinstance(index, int) else (index.start, index.stop)
        cut = []
        for (begin, *rest), tensor in self.parts:
            low, high = max(first, begin), min(stop, begin + tensor.shape[0])
            if low >= high:
                continue
            if isinstance(index, int):
                cut.append(Part(tuple(rest), tensor[low - begin]))
            else:
                cut.append(Part((low - first, *rest), tensor[low - begin : high - begin]))
        rows = () if isinstance(index, int) else (stop - first,)
        return Assembled(self.dtype, (*rows, *self.shape[1:]), cut, self.copied)

    def over(self, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each part beside the view of ``target``, a tensor of the same shape, where it belongs."""
        for begin, tensor in self.parts:
            view = target
            for dimension, (start, size) in enumerate(zip(begin, tensor.shape)):
                view = view.narrow(dimension, start, size)
            yield tensor, view
            if self.copied is not None:
                self.copied(tensor.numel() * tensor.element_size())


#: What a save takes bytes from.
Memory = Union[torch.Tensor, Assembled]
