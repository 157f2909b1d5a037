"""Checks of the arguments of `save` that say at which moment of a training a checkpoint is saved."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from shardsave._common.strict_json import MAX_DIGITS, glimpse
from shardsave._common.words import an
from shardsave._format.index import Moment


def check_moment(step: object, metrics: object, *, is_training: bool = False) -> Moment:
    """Checks ``step`` and ``metrics``; if one of them is given, or with ``is_training``, the result also has the time and one rank.

    Raises TypeError, ValueError.
    """
    if step is None and metrics is None and not is_training:
        return Moment()
    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Moment(_step(step) if step is not None else None, None, _metrics(metrics), 1, created)


def _step(step: object) -> int:
    if isinstance(step, (bool, np.bool_)) or not isinstance(step, Integral):
        raise TypeError(f"step must be an int, not {an(type(step).__name__)}")
    number = int(step)
    if number < 0:
        raise ValueError(f"step must be at least 0, not {glimpse(number)}")
    if number >= 10**MAX_DIGITS:
        raise ValueError(f"step must have at most {MAX_DIGITS} digits, not {glimpse(number)}")
    return number


def _metrics(metrics: object) -> dict[str, float]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must be a mapping of names to numbers, not {an(type(metrics).__name__)}")
    numbers = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the names of metrics must be strings, not {glimpse(name)}")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"the names of metrics must be text in Unicode, {glimpse(name)} has half of a surrogate pair")
        numbers[name] = _number(f"metrics[{glimpse(name)}]", value)
    return numbers


def _number(place: str, value: Any) -> float:
    """``value`` as a number of Python; also of numpy or torch, if it has one element."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_meta and value.numel() == 1
    if is_tensor or (isinstance(value, (np.ndarray, np.generic)) and value.size == 1):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{place} must be a real number, or a tensor or array with one, not {an(type(value).__name__)}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if isinstance(number, int) and abs(number) >= 10**MAX_DIGITS:
        raise ValueError(f"{place} must have at most {MAX_DIGITS} digits")
    return number
