"""A tensor in several chunks, as distributed savers write it. The whole tensor is never assembled in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from shardsave._common.boxes import Box, boxes_in_file, copy_in, copy_out


class Chunk(NamedTuple):
    """Some elements of the whole: a box that begins at index ``begin`` and has the shape of ``tensor``."""

    begin: tuple[int, ...]
    tensor: torch.Tensor


class Assembled:
    """A source on the CPU that consists of ``chunks``, which cover each element once.

    ``dtype`` is that of the file; chunks of another dtype are cast. ``copied`` is called with the number of bytes that were read from
    the chunks, on the thread that read them.
    """

    cuda_device = -1

    def __init__(
        self, dtype: torch.dtype, shape: Sequence[int], chunks: Sequence[Chunk], copied: Callable[[int], None] | None = None
    ) -> None:
        self.dtype = dtype
        self.shape = tuple(shape)
        self.chunks = tuple(chunks)
        self._copied = copied

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        with torch.no_grad():
            for box, target in boxes_in_file(self.shape, self.dtype, offset, view):
                for elements, place in self._overlaps(box, target):
                    copy_out(elements, place)
                    if self._copied is not None:
                        self._copied(elements.numel() * elements.element_size())

    def scatter(self, offset: int, view: memoryview) -> None:
        with torch.no_grad():
            for box, source in boxes_in_file(self.shape, self.dtype, offset, view):
                for elements, place in self._overlaps(box, source):
                    copy_in(place, elements)

    def _overlaps(self, box: Box, view: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each chunk that meets ``box``: its elements in the box, and the same elements of ``view``, which is the whole box."""
        all_slices = (*box, *(slice(0, size) for size in self.shape[len(box) :]))
        for begins, tensor in self.chunks:
            in_chunk, in_view = [], []
            for rows, begin, size in zip(all_slices, begins, tensor.shape):
                first, stop = max(rows.start, begin), min(rows.stop, begin + size)
                in_chunk.append(slice(first - begin, stop - begin))
                in_view.append(slice(first - rows.start, stop - rows.start))
                if first >= stop:
                    break
            else:
                yield tensor[tuple(in_chunk)], view[tuple(in_view)]
