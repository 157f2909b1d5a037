"""A range of bytes of a source, as a source: what a reader needs that wants a part of a stored tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from shardsave._common.sources import ByteSource


class ByteRange(NamedTuple):
    """``nbytes`` bytes of ``whole``, from ``first`` on. Its shape counts elements, since a range need not be a box."""

    whole: ByteSource
    first: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nbytes // self.dtype.itemsize,)

    @property
    def cuda_device(self) -> int:
        return self.whole.cuda_device

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        self.whole.gather(self.first + offset, view)

    def scatter(self, offset: int, view: memoryview) -> None:
        self.whole.scatter(self.first + offset, view)
