"""A tensor that is spread over the ranks of a group, as a source: what this rank holds of it, and which ranks hold the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.layouts import Extent, Layout, Placed
from shardsave._common.senders import senders
from shardsave._common.sources import ByteSource, TensorSource

_Source = TypeVar("_Source", bound=ByteSource)


class Spread:
    """A source of ``dtype`` (that of the file) whose elements are where ``layout`` says.

    ``local``: the boxes of this rank, in the order of ``layout.boxes``, as views of live memory; empty boxes are left out. Chunks of
    another dtype are cast. `gather` needs all elements here; `scatter` stores those that are here, and skips the others.
    ``sums``: the checksums of the boxes, if they are known.
    """

    __slots__ = ("_stand_in", "_sums", "dtype", "layout", "local")

    def __init__(self, dtype: torch.dtype, layout: Layout, local: Sequence[Chunk], sums: Sequence[int] = ()) -> None:
        self.dtype = dtype
        self.layout = layout
        self.local = tuple(local)
        self._sums = tuple(sums)
        self._stand_in: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.layout.shape) * self.dtype.itemsize

    @property
    def cuda_device(self) -> int:
        tensor = self.local[0].tensor if self.local else None
        return tensor.get_device() if tensor is not None and tensor.is_cuda else -1

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all elements."""
        return sum(chunk.tensor.numel() for chunk in self.local) == math.prod(self.layout.shape)

    @property
    def stand_in(self) -> torch.Tensor:
        """A tensor on the meta device with the shape and dtype of the whole, always the same object."""
        if self._stand_in is None:
            self._stand_in = torch.empty(self.layout.shape, dtype=self.dtype, device="meta")
        return self._stand_in

    def memory(self) -> tuple[int, int] | None:
        if len(self.local) == 1 and self.local[0].tensor.shape == self.layout.shape:
            return TensorSource(self.local[0].tensor, self.dtype).memory()
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        if not self.is_whole:
            raise ValueError(f"this rank holds only a part of a tensor of shape {list(self.shape)}")
        Assembled(self.dtype, self.shape, self.local).gather(offset, view)

    def scatter(self, offset: int, view: memoryview) -> None:
        Assembled(self.dtype, self.shape, self.local).scatter(offset, view)

    def senders(self, owner: int, hosts: Sequence[int]) -> tuple[tuple[int, Extent], ...]:
        """Which rank gives which box to ``owner``; each element is in one of them. ``hosts``: the number of each rank's host."""
        return senders(self.layout, owner, hosts)

    def of(self, tensors: Sequence[torch.Tensor], sums: Sequence[int]) -> Spread:
        """The same with ``tensors`` in the place of the local boxes; ``sums``: their checksums."""
        return Spread(self.dtype, self.layout, [Chunk(chunk.begin, tensor) for chunk, tensor in zip(self.local, tensors)], sums)

    def sum_of(self, tensor: torch.Tensor) -> int | None:
        """The checksum of ``tensor``, if it is a local box and its checksum is known."""
        return next((known for chunk, known in zip(self.local, self._sums) if chunk.tensor is tensor), None)

    def cast(self, dtype: torch.dtype) -> Spread:
        """The same elements, cast to ``dtype`` on their way to the file."""
        return Spread(dtype, self.layout, self.local)


def kinds_of(sources: Sequence[_Source]) -> tuple[list[int], list[_Source]]:
    """The number of the kind of each source, and the first source of each kind.

    Sources of a kind have equal dtypes and shapes and, if they are spread, the same layout. Of many tensors most have few layouts, whose
    identity is found much faster than their equality; so two kinds may have equal layouts.
    """
    numbers: dict[Any, int] = {}
    first: list[_Source] = []
    kinds = []
    for source in sources:
        key = (source.dtype, id(source.layout)) if isinstance(source, Spread) else (source.dtype, source.shape)
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(first)
            first.append(source)
        kinds.append(number)
    return kinds, first


def local_chunks(layout: Placed, rank: int, local: torch.Tensor) -> tuple[Chunk, ...]:
    """``local``, the tensor in which ``rank`` holds its part of ``layout``, as the boxes of it.

    Raises ValueError, with the shape that was expected, if ``local`` has another one.
    """
    sizes, inside = layout.local(rank)
    if local.shape != sizes and (inside or local.numel()):
        raise ValueError(f"shape {list(sizes)} was expected on this rank, it has {list(local.shape)}")
    if len(inside) == 1:
        return (Chunk(inside[0].begin, local),)
    return tuple(Chunk(begin, local[place]) for begin, place in inside)
