"""Sources: everything that has bytes for a file or takes bytes from one. The engine knows tensors only as sources."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from shardsave._common.boxes import boxes_in_file, copy_in, copy_out

#: The most elements that a `CastSource` casts at one time.
_CAST_ELEMENTS = 1 << 20


class ByteSource(Protocol):
    """Elements of ``dtype`` and ``shape``, which a file holds in C order; offsets are bytes in that order.

    Threads: `gather` and `scatter` are called on any thread, several at a time, for ranges that do not overlap.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch; the header's shape differs from it for packed dtypes."""

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""

    @property
    def cuda_device(self) -> int:
        """The ordinal of the CUDA device that holds the elements; -1 if they are elsewhere."""

    def memory(self) -> tuple[int, int] | None:
        """The `cuda_device` and the address, if the memory there holds exactly the bytes of the file; None otherwise."""

    def gather(self, offset: int, view: memoryview) -> None:
        """Fills ``view`` with the bytes that follow ``offset``."""

    def scatter(self, offset: int, view: memoryview) -> None:
        """Stores ``view`` as the bytes that follow ``offset``."""


class TensorSource:
    """A strided tensor. If ``dtype``, the dtype in the file, differs from the tensor's, elements are cast as `Tensor.copy_` does."""

    __slots__ = ("dtype", "tensor")

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.dtype = dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSource:
        """``tensor`` as it is, without a cast."""
        return cls(tensor, tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    @property
    def cuda_device(self) -> int:
        return self.tensor.get_device() if self.tensor.is_cuda else -1

    def memory(self) -> tuple[int, int] | None:
        tensor, dtype = self.tensor, self.dtype
        is_plain = tensor.dtype is dtype and tensor.is_contiguous() and not tensor.is_neg()
        if is_plain and not (dtype.is_complex and tensor.is_conj()):
            if tensor.is_cpu:
                return -1, tensor.data_ptr()
            if tensor.is_cuda:
                return tensor.get_device(), tensor.data_ptr()
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        with torch.no_grad():
            for box, target in boxes_in_file(self.shape, self.dtype, offset, view):
                copy_out(self.tensor.detach()[box], target)

    def scatter(self, offset: int, view: memoryview) -> None:
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
            for box, source in boxes_in_file(self.shape, self.dtype, offset, view):
                copy_in(source, self.tensor.detach()[box])


class SwappedSource(TensorSource):
    """A tensor whose elements have the byte order of another kind of processor; each block is swapped on its way to the file."""

    __slots__ = ()

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        super().gather(offset, view)
        part = self.dtype.itemsize // (2 if self.dtype.is_complex else 1)
        np.frombuffer(view, dtype=f"u{part}").byteswap(inplace=True)


class ByteRange(NamedTuple):
    """The ``nbytes`` bytes from ``begin`` on of another source, as one dimension. The range cuts no element."""

    source: ByteSource
    begin: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.nbytes // self.source.dtype.itemsize,)

    @property
    def cuda_device(self) -> int:
        return self.source.cuda_device

    def memory(self) -> tuple[int, int] | None:
        place = self.source.memory()
        return None if place is None else (place[0], place[1] + self.begin)

    def gather(self, offset: int, view: memoryview) -> None:
        self.source.gather(self.begin + offset, view)

    def scatter(self, offset: int, view: memoryview) -> None:
        self.source.scatter(self.begin + offset, view)


class CastSource(NamedTuple):
    """Another source, whose elements are cast to ``dtype`` on their way to the file, as `Tensor.copy_` does. Nothing reads into it."""

    source: ByteSource
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // self.source.dtype.itemsize * self.dtype.itemsize

    @property
    def cuda_device(self) -> int:
        return self.source.cuda_device

    def memory(self) -> None:
        return None

    def gather(self, offset: int, view: memoryview) -> None:
        """Casts at most `_CAST_ELEMENTS` at a time, so that working memory is bounded whatever the two dtypes are."""
        wide, narrow = self.source.dtype.itemsize, self.dtype.itemsize
        elements = len(view) // narrow
        before = torch.empty(min(elements, _CAST_ELEMENTS), dtype=self.source.dtype, device="cpu")
        buffer = before.view(torch.uint8).numpy().data
        for first in range(0, elements, _CAST_ELEMENTS):
            count = min(_CAST_ELEMENTS, elements - first)
            self.source.gather((offset // narrow + first) * wide, buffer[: count * wide])
            after = torch.frombuffer(view, dtype=torch.uint8, count=count * narrow, offset=first * narrow)
            with torch.no_grad():
                after.view(self.dtype).copy_(before[:count])

    def scatter(self, offset: int, view: memoryview) -> None:
        raise NotImplementedError("a cast tensor is only written")
