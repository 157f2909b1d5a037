"""Reads what follows the tag of a value that contains no other value and no tensor. Nothing in it is believed."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from shardsave._training.write_values import SCALARS

#: The name of a device, or of a kind of device.
DEVICE = re.compile(r"[a-z]{2,16}(:\d{1,4})?")


def _float(word: Any) -> float:
    if word not in ("nan", "inf", "-inf"):
        raise ValueError(word)
    return float(word)


def _number(value: Any) -> float:
    return _float(value["float"]) if type(value) is dict and value.keys() == {"float"} else _real(value)


def _real(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(value)
    return float(value)


def _complex(value: Any) -> complex:
    real, imaginary = value
    return complex(_number(real), _number(imaginary))


def _scalar(value: Any) -> Any:
    name, item = value
    if name not in SCALARS:
        raise ValueError(name)
    if type(item) is dict:
        item = _complex(item["complex"]) if "complex" in item else _number(item)
    elif type(item) not in (bool, int, float):
        raise TypeError(item)
    if type(item) is int:
        return np.array([item], dtype=name)[0]
    with np.errstate(all="ignore"):
        return np.array([item]).astype(name)[0]


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(name)
    return dtype


def _device(name: Any) -> torch.device:
    if not DEVICE.fullmatch(name):
        raise ValueError(name)
    return torch.device(name)


def _size(sizes: Any) -> torch.Size:
    if type(sizes) is not list or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError(sizes)
    return torch.Size(sizes)


def _bytes(text: Any) -> bytes:
    return base64.b64decode(text.encode("ascii"), validate=True)


#: Tag → reads what follows it; raises one of several errors if that has another form.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "float": _float,
    "complex": _complex,
    "bytes": _bytes,
    "dtype": _dtype,
    "device": _device,
    "size": _size,
    "scalar": _scalar,
}
