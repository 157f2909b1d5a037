"""Which options a group of an optimizer can take: each must be of a kind that this option has, or it would fail only in a later step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch

from shardsave._common.strict_json import glimpse
from shardsave._common.words import an
from shardsave._training.kinds import inner

#: Options that torch's schedulers add to a group. All are numbers.
_OF_SCHEDULERS = dict.fromkeys(("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"), 0.0)

_NUMBER, _FLAG = "a number", "True or False"


def known_options(optimizer: Any) -> tuple[Mapping[str, Any], ...]:
    """What is known of the options of ``optimizer``: its defaults, those of its class, and what schedulers add. Each: name → a value."""
    optimizer = inner(optimizer)
    return getattr(optimizer, "defaults", {}), dict(_defaults_of_class(type(optimizer))), _OF_SCHEDULERS


def wrong_option(saved: Mapping[str, Any], live: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> str | None:
    """The first of the ``saved`` options that a group cannot take, in words; None if it can take all. ``known``: see `known_options`.

    An option may be what it is in the ``live`` group, or by default. So an int may follow a float or a tensor, and None may come where
    the class knows it. Of options that are not those of the optimizer, nothing is known, and all is taken.
    """
    for name, value in saved.items():
        examples = [values[name] for values in known if name in values]
        if not examples:
            continue
        examples += [live[name]] if name in live else []
        kinds = dict.fromkeys(map(_kind, examples))
        # Nothing tells what else an option can be that is None everywhere.
        if kinds.keys() <= {"None"} or None in kinds or any(_fits(value, example) for example in examples):
            continue
        return f"the option {name!r} was expected to be {' or '.join(map(str, kinds))}, the checkpoint has {_words(value)}"
    return None


def _defaults_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            yield name, parameter.default


def _kind(value: Any) -> str | None:
    """What kind of option ``value`` is, in words; None for a kind of which nothing is known."""
    if value is None:
        return "None"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if math.prod(value.shape) != 1:
            return f"a tensor of {list(value.shape)}"
        return _FLAG if value.dtype in (torch.bool, np.bool_) else _NUMBER
    if isinstance(value, (bool, np.bool_)):
        return _FLAG
    if isinstance(value, Real):
        return _NUMBER
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return f"a tuple of {len(value)}"
    return "a dict" if isinstance(value, Mapping) else None


def _fits(value: Any, example: Any) -> bool:
    if _kind(value) != _kind(example):
        return _kind(example) == _FLAG and type(value) is int and value in (0, 1)
    if isinstance(value, (list, tuple)):
        return all(inside is None or _fits(item, inside) for item, inside in zip(value, example))
    return True


def _words(value: Any) -> str:
    """``value`` for a message. A tensor has not been read yet."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a tensor of {list(value.shape)}"
    return glimpse(value) if _kind(value) is not None else an(type(value).__name__)
