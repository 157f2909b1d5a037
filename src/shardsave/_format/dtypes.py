"""The dtypes of safetensors and their names in torch.

Source: the ``Dtype`` enumeration of the safetensors format, version 0.8.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class DType(NamedTuple):
    """A dtype: its name in a safetensors header, its name in torch, and the bits of one element."""

    name: str
    torch_name: str
    bits: int

    @property
    def torch(self) -> torch.dtype:
        """torch's dtype. Nothing else here imports torch, since that takes longer than inspecting most checkpoints."""
        return _torch_dtype(self.torch_name)


@cache
def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


_ROWS = (
    DType("BOOL", "bool", 8),
    DType("U8", "uint8", 8),
    DType("I8", "int8", 8),
    DType("F8_E5M2", "float8_e5m2", 8),
    DType("F8_E4M3", "float8_e4m3fn", 8),
    DType("F8_E8M0", "float8_e8m0fnu", 8),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    DType("I16", "int16", 16),
    DType("U16", "uint16", 16),
    DType("F16", "float16", 16),
    DType("BF16", "bfloat16", 16),
    DType("I32", "int32", 32),
    DType("U32", "uint32", 32),
    DType("F32", "float32", 32),
    DType("C64", "complex64", 64),
    DType("F64", "float64", 64),
    DType("I64", "int64", 64),
    DType("U64", "uint64", 64),
    # Two elements in one byte: the last dimension in the header is twice that of the torch tensor.
    DType("F4", "float4_e2m1fn_x2", 4),
)

BY_NAME = {row.name: row for row in _ROWS}

#: dtypes of safetensors for which torch has none.
NOT_IN_TORCH = ("F6_E2M3", "F6_E3M2")

if TYPE_CHECKING:
    BY_TORCH: dict[torch.dtype, DType]


def __getattr__(name: str) -> object:
    """Builds `BY_TORCH`, torch's dtype → `DType`, at its first use."""
    if name != "BY_TORCH":
        raise AttributeError(f"module 'shardsave._format.dtypes' has no attribute {name!r}")
    table = globals()[name] = {row.torch: row for row in _ROWS}
    return table


def item_bytes(name: str) -> int:
    """The alignment of a tensor with this dtype, in bytes; 1 for a packed dtype."""
    return max(1, BY_NAME[name].bits // 8)


def logical_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a safetensors header of a torch tensor with ``dtype`` and ``shape``."""
    if dtype.itemsize > 1 or dtype != BY_NAME["F4"].torch:
        return tuple(shape)
    return (*shape[:-1], shape[-1] * 2) if shape else (2,)


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the torch tensor for ``shape`` in a header; the inverse of :func:`logical_shape`."""
    if name == "F4":
        return (*shape[:-1], shape[-1] // 2)
    return shape
