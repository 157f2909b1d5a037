"""NumPy arrays in a pickle, read as tensors by code of our own: a dtype, a shape, an order and bytes. NumPy's own code is not called."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Union

import numpy as np
import torch

from shardsave._common.words import human_bytes
from shardsave._foreign.containers import UnreadArray
from shardsave._foreign.records import Forbidden, GlobalName, Record

#: The kinds and sizes of elements that torch has too, as `numpy.dtype` spells them.
_NUMBERS = re.compile(r"\?|b1|[iu][1248]|f[248]|c(?:8|16)")

#: dtypes of the package ml_dtypes, which have the same name in torch.
_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")

#: Objects and strings: an array of these has no numbers that could be weights.
_NO_NUMBERS = ("O", "S", "U")


#: The most dimensions of an array, in NumPy 2.
_MOST_DIMENSIONS = 64

Charge = Callable[[int], None]

#: How a dtype spells the byte order that this processor does not have.
_OTHER_ORDER = ">" if sys.byteorder == "little" else "<"


class _DType(NamedTuple):
    """``numbers``: the elements, as NumPy or torch know them; None if torch has none like them. ``name`` is for messages."""

    name: str
    numbers: Union[str, torch.dtype, None]
    swapped: bool


class Array(Record):
    """An array; what the pickle says of it is complete once all of the pickle has been read."""

    name = "numpy.ndarray"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.name

    def described(self) -> tuple[Any, Any, Any, Any]:
        """The shape, the dtype, whether columns come first, and the bytes."""
        state = self.state
        if not isinstance(state, tuple) or len(state) < 4:
            raise Forbidden("describes an array that cannot be")
        return state[-4], state[-3], state[-2], state[-1]

    def read(self, charge: Charge) -> Union[torch.Tensor, UnreadArray, None]:
        """The array as a tensor; an `UnreadArray` if torch has no such numbers; None for strings and other objects.

        ``charge`` is called with the number of its bytes before they are copied.
        """
        shape, dtype, columns_first, raw = self.described()
        spelled = _dtype_of(dtype)
        if spelled is None:
            return None
        data = _bytes_of(raw, charge)
        if (
            not isinstance(shape, tuple)
            or len(shape) > _MOST_DIMENSIONS
            or not all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
        ):
            raise Forbidden("describes an array that cannot be")
        if spelled.numbers is None:
            return UnreadArray(f"NumPy array of {spelled.name}, {human_bytes(len(data))}", shape, len(data))
        return _tensor(spelled, shape, bool(columns_first), data)


class _Buffer(Array):
    """An array as protocol 5 has it: ``numpy._core.numeric._frombuffer(bytes, dtype, shape, order)``."""

    def described(self) -> tuple[Any, Any, Any, Any]:
        if len(self.arguments) != 4:
            raise Forbidden("describes an array that cannot be")
        raw, dtype, shape, order = self.arguments
        return shape, dtype, order == "F", raw


class _Masked(Array):
    """An array with a mask. Its values are not weights as they are, so it is counted and not read."""

    name = "numpy.ma.MaskedArray"

    def read(self, charge: Charge) -> UnreadArray:
        raw = self.state[4] if isinstance(self.state, tuple) and len(self.state) > 4 else None
        data = _bytes_of(raw, charge)
        return UnreadArray(f"NumPy array with a mask, {human_bytes(len(data))}", (len(data),), len(data))


def _tensor(spelled: _DType, shape: tuple[int, ...], columns_first: bool, data: Union[bytes, bytearray]) -> torch.Tensor:
    elements = f"u{spelled.numbers.itemsize}" if isinstance(spelled.numbers, torch.dtype) else spelled.numbers
    kind = np.dtype(elements)
    if math.prod(shape) * kind.itemsize != len(data):
        raise Forbidden(f"has an array of shape {shape} in {len(data)} bytes")
    stored = np.frombuffer(data, kind.newbyteorder("S") if spelled.swapped else kind)
    array = np.array(stored.reshape(shape, order="F" if columns_first else "C"), dtype=kind, order="C")  # its own, native bytes
    tensor = torch.from_numpy(array)
    return tensor.view(spelled.numbers) if isinstance(spelled.numbers, torch.dtype) else tensor


def _dtype_of(dtype: Any) -> _DType | None:
    """The dtype that a record of ``numpy.dtype`` describes; None for strings and other objects."""
    if not isinstance(dtype, Record) or not dtype.arguments:
        raise Forbidden("has an array without a dtype")
    spelled, state = dtype.arguments[0], dtype.state
    swapped = isinstance(state, tuple) and len(state) > 1 and state[1] == _OTHER_ORDER
    if isinstance(spelled, type) and issubclass(spelled, Record):
        short = spelled.name.rpartition(".")[2]
        return _DType(short, getattr(torch, short) if short in _ML_DTYPES else None, swapped)
    if not isinstance(spelled, str):
        raise Forbidden("has an array without a dtype")
    if spelled.startswith(_NO_NUMBERS):
        return None
    return _DType(spelled, spelled if _NUMBERS.fullmatch(spelled) else None, swapped)


def _bytes_of(raw: Any, charge: Charge) -> Union[bytes, bytearray]:
    """The bytes of an array; protocols before 3 have them as text."""
    if isinstance(raw, (bytes, bytearray, str)):
        charge(len(raw))
    if isinstance(raw, (bytes, bytearray)):
        return raw
    if isinstance(raw, str):  # written by Python 2, and read as UTF-8 where it is that
        return raw.encode("utf-8", "surrogateescape")
    if isinstance(raw, Record) and raw.name == "builtins.bytes" and not raw.arguments:
        return b""
    if isinstance(raw, Record) and raw.name in ("_codecs.encode", "builtins.bytearray") and raw.arguments:
        text = raw.arguments[0]
        if not isinstance(text, str):
            return _bytes_of(text, charge)
        charge(len(text))
        return text.encode("latin1")
    raise Forbidden("has an array without bytes")


def _named(modules: Iterable[str], name: str, record: type[Array]) -> dict[GlobalName, Any]:
    return {(module, name): record for module in modules}


#: What makes an array: the names that numpy 1 and 2 write.
ARRAY_NAMES: dict[GlobalName, Any] = {
    **_named(("numpy.core.multiarray", "numpy._core.multiarray"), "_reconstruct", Array),
    **_named(("numpy.core.numeric", "numpy._core.numeric"), "_frombuffer", _Buffer),
    ("numpy.ma.core", "_mareconstruct"): _Masked,
}
