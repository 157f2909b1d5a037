"""What kind of thing a value is that an optimizer, a scheduler or a scaler holds: only a value of the same kind can follow it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from shardsave._common.strict_json import glimpse
from shardsave._common.words import an

NUMBER, FLAG = "a number", "True or False"


def kind_in_words(value: Any) -> str | None:
    """The kind of ``value``; None for one of which nothing is known. A tensor with one element is a number."""
    if value is None:
        return "None"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if math.prod(value.shape) != 1:
            return f"a tensor of {list(value.shape)}"
        return FLAG if value.dtype in (torch.bool, np.bool_) else NUMBER
    if isinstance(value, (bool, np.bool_)):
        return FLAG
    if isinstance(value, Real):
        return NUMBER
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"a tuple of {len(value)}"
    return "a dict" if isinstance(value, Mapping) else None


def fits(value: Any, example: Any) -> bool:
    """Whether ``value`` can be where ``example`` is."""
    if kind_in_words(value) != kind_in_words(example):
        return kind_in_words(example) == FLAG and type(value) is int and value in (0, 1)
    if isinstance(value, (list, tuple)):
        return all(inside is None or fits(item, inside) for item, inside in zip(value, example))
    return True


def value_in_words(value: Any) -> str:
    """``value`` for a message. A tensor has not been read yet."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of {list(value.shape)}{'' if _is_floating(value) else f' of {dtype}'}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return f"{an(type(value).__name__)} of {len(value)} with tensors"
    return glimpse(value) if kind_in_words(value) is not None else an(type(value).__name__)


def _is_floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else value.dtype.kind == "f"
