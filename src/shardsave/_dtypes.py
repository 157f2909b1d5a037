"""The dtypes that safetensors has, and what torch calls them.

Source: the ``Dtype`` enumeration of the safetensors format, version 0.8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class DType(NamedTuple):
    """One row: the name in a safetensors header, torch's dtype, and the bits of one element."""

    name: str
    torch: torch.dtype
    bits: int


_ROWS = (
    DType("BOOL", torch.bool, 8),
    DType("U8", torch.uint8, 8),
    DType("I8", torch.int8, 8),
    DType("F8_E5M2", torch.float8_e5m2, 8),
    DType("F8_E4M3", torch.float8_e4m3fn, 8),
    DType("F8_E8M0", torch.float8_e8m0fnu, 8),
    DType("F8_E5M2FNUZ", torch.float8_e5m2fnuz, 8),
    DType("F8_E4M3FNUZ", torch.float8_e4m3fnuz, 8),
    DType("I16", torch.int16, 16),
    DType("U16", torch.uint16, 16),
    DType("F16", torch.float16, 16),
    DType("BF16", torch.bfloat16, 16),
    DType("I32", torch.int32, 32),
    DType("U32", torch.uint32, 32),
    DType("F32", torch.float32, 32),
    DType("C64", torch.complex64, 64),
    DType("F64", torch.float64, 64),
    DType("I64", torch.int64, 64),
    DType("U64", torch.uint64, 64),
    # Two elements in a byte: the last logical dimension is twice that of the torch tensor.
    DType("F4", torch.float4_e2m1fn_x2, 4),
)

BY_NAME = {row.name: row for row in _ROWS}
BY_TORCH = {row.torch: row for row in _ROWS}


def item_bytes(name: str) -> int:
    """The alignment, in bytes, of a tensor with this dtype; a packed dtype counts as one byte."""
    return max(1, BY_NAME[name].bits // 8)


def logical_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape that a safetensors header gives for ``tensor``."""
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.float4_e2m1fn_x2:
        if not shape:
            return (2,)
        return (*shape[:-1], shape[-1] * 2)
    return shape


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the torch tensor for a header's ``shape``; the inverse of :func:`logical_shape`."""
    if name == "F4":
        return (*shape[:-1], shape[-1] // 2)
    return shape
