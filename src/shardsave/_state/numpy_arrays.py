"""numpy arrays as tensors, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shardsave._state.savable import refuse

#: dtypes that the package ml_dtypes adds to numpy; torch has them under the same names.
_ML_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"})


def tensor_of_array(name: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor in the memory of ``array``; for an array `is_swapped`, its values are not those of the array.

    Raises UnsupportedTensorError, naming the entry ``name``.
    """
    if isinstance(array, np.ma.MaskedArray):
        refuse(name, "an array without a mask was expected", "it has a mask; pass the result of its .filled(…)")
    if any(stride < 0 or stride % max(1, array.itemsize) for stride in array.strides):
        expected = "an array with positive strides of whole elements was expected"
        refuse(name, expected, f"its strides are {array.strides} bytes; pass numpy.ascontiguousarray(…)")
    if is_swapped(array):
        array = array.view(array.dtype.newbyteorder("="))
    if not array.flags.writeable:  # torch would warn about writes into the tensor; nothing writes into it
        array = np.lib.stride_tricks.as_strided(_writeable_alias(array), array.shape, array.strides)
    try:
        if array.dtype.name in _ML_DTYPES:
            as_integer = torch.from_numpy(array.view(np.uint16 if array.itemsize == 2 else np.uint8))
            return as_integer.view(getattr(torch, array.dtype.name))
        return torch.from_numpy(array)
    except TypeError:
        refuse(name, "a dtype that torch has was expected", f"it is {array.dtype}")


def is_swapped(value: object) -> bool:
    """Whether ``value`` is an array in the byte order of another kind of processor."""
    return isinstance(value, np.ndarray) and not value.dtype.isnative


def _writeable_alias(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    class Interface:
        def __init__(self) -> None:
            self.keep = array
            address, _ = array.__array_interface__["data"]
            self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}

    return np.asarray(Interface()).view(array.dtype)
