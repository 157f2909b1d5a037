"""Kinds of Python objects: what has elements, what is looked up by its value, what a class gives to its instances."""

from __future__ import annotations

import collections
import enum
import pathlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
_CONTAINERS = (collections.OrderedDict, dict, list, set)
_KEYS = (type(None), bool, int, float, str, bytes, complex, range, pathlib.PurePath, torch.dtype, torch.device, enum.Enum, type,
         *FUNCTIONS, np.generic)  # fmt: skip
MAX_COLLIDING = 100


def in_class(kind: type, name: str) -> Any:
    """What stands in ``kind`` or a base of it under ``name``, no descriptor and no metaclass asked; None where there is nothing."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def has_finaliser(kind: type) -> bool:
    """Whether code of ``kind`` runs when an instance goes."""
    return any("__del__" in vars(base) for base in kind.__mro__)


def container_of(kind: type) -> type:
    """The type of Python's own that ``kind`` gets its elements from; ``object`` where it has none."""
    return next((base for base in _CONTAINERS if issubclass(kind, base)), object)


def is_key(thing: object) -> bool:
    """Whether ``thing`` is looked up by its value, in a set or as the key of a dict."""
    if isinstance(thing, (tuple, frozenset)):
        return all(map(is_key, thing))
    return isinstance(thing, _KEYS)


def collide(keys: Iterable[object]) -> bool:
    """Whether so many keys have one hash that a set of them takes a time that grows with the square of their number."""
    return max(collections.Counter(map(hash, keys)).values(), default=0) > MAX_COLLIDING


def shadows_method(owner: object, name: str, value: Any) -> bool:
    """Whether ``value``, set on ``owner``, would be called in the place of a method.

    A method of the object itself may be: some choose their ``forward`` so.
    """
    of_torch = isinstance(owner, nn.Module) and name in vars(nn.Module)
    if isinstance(value, types.MethodType) and value.__self__ is owner:
        return of_torch and name != "forward"
    there = getattr(type(owner), name, None)
    return callable(value) and (of_torch or (callable(there) and not isinstance(there, type)))


def slots_of(kind: type) -> list[str]:
    return [
        name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, types.MemberDescriptorType)
    ]


def own_getstate(kind: type) -> Callable[[Any], Any] | None:
    given = getattr(kind, "__getstate__", None)
    return given if given is not getattr(object, "__getstate__", None) else None
