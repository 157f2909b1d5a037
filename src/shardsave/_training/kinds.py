"""What a value in ``training=`` is: one of the kinds that have a state of their own, or plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from shardsave._state.fsdp import reshard
from shardsave._training.per_rank import PerRank
from shardsave._training.places import ROOT, Place
from shardsave._training.write_values import MAX_DEPTH

Kind = Literal["module", "optimizer", "generator", "object", "tensor", "array"]

GENERATORS: Mapping[type, str] = {
    torch.Generator: "torch.Generator",
    np.random.Generator: "numpy.random.Generator",
    np.random.RandomState: "numpy.random.RandomState",
    random.Random: "random.Random",
}


def kind_of(value: Any) -> Kind | None:
    """The kind of ``value``; None for containers, plain data, and what cannot be saved."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, np.ndarray):
        return "array"
    if isinstance(value, tuple(GENERATORS)):
        return "generator"
    if isinstance(value, type) or not (has_method(value, "state_dict") and has_method(value, "load_state_dict")):
        return None
    return "optimizer" if isinstance(value, torch.optim.Optimizer) else "object"


def has_method(value: Any, name: str) -> bool:
    return callable(getattr(value, name, None))


def items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """(key, item) of a container; None if ``value`` is none."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if type(value) in (list, tuple) else None


def leaves_in(value: Any, place: Place = ROOT, depth: int = 0) -> Iterator[tuple[Place, Any]]:
    """Every value in ``value`` that is of a kind, with its place. Containers that contain themselves are left to the writer."""
    if isinstance(value, PerRank):
        value = value.value
    if kind_of(value) is not None:
        yield place, value
    elif depth < MAX_DEPTH and (items := items_of(value)):
        for key, item in items:
            if not isinstance(item, (bool, int, float, str, type(None))):
                yield from leaves_in(item, place.at(key), depth + 1)


def reshard_all(model: Any, training: Any) -> None:
    """Puts the sharded parameters of all modules in place; after a forward pass some may be whole."""
    for module in (model, *(leaf for _, leaf in leaves_in(training))):
        if isinstance(module, nn.Module):
            reshard(module)


def class_name(value: Any) -> str:
    """The class of ``value``, or of what it wraps, as in accelerate's wrappers; only for messages and to compare."""
    return type(inner(value)).__name__


def inner(value: Any) -> Any:
    """The optimizer or the scheduler inside accelerate's wrappers."""
    for attribute in ("optimizer", "scheduler"):
        while type(value).__module__.startswith("accelerate.") and attribute in getattr(value, "__dict__", {}):
            if not has_method(vars(value)[attribute], "state_dict"):
                break
            value = vars(value)[attribute]
    return value
