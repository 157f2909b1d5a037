"""Kinds of Python objects: what has elements, what is looked up by its value, what a class gives to its instances.

Nothing here asks an object: its class may have code of its own for that (``__getattribute__``, ``__class__``, ``__iter__``), and the
object may hold what a file says.
"""

from __future__ import annotations

import collections
import enum
import functools
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
_KEYS = frozenset(
    [type(None), bool, int, float, str, bytes, complex, range, pathlib.PosixPath, torch.dtype, torch.device, *FUNCTIONS]
)
_KINDS_OF_KEYS = (enum.Enum, type, np.generic)
MAX_COLLIDING = 100

_CALLED_BY_CLASSES = (classmethod, staticmethod, functools.partialmethod, functools.singledispatchmethod)


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
    kind = type(thing)
    if kind in _KEYS:
        return True
    if issubclass(kind, (tuple, frozenset)):
        elements: Iterable[object] = (tuple if issubclass(kind, tuple) else frozenset).__iter__(thing)  # type: ignore[arg-type]
        return _hashed_by_python(kind) and all(map(is_key, elements))
    return issubclass(kind, _KINDS_OF_KEYS) and _hashed_by_python(kind)


def _hashed_by_python(kind: type) -> bool:
    """Whether no code of a class runs where instances are looked up."""
    homes = (next(base for base in kind.__mro__ if name in vars(base)) for name in ("__hash__", "__eq__"))
    return all(home.__module__ == "enum" or not home.__flags__ & HEAP_TYPE for home in homes)


def made_up(kind: type[enum.Flag], value: int) -> bool:
    """Whether ``value`` is that of no named member, and code of the class's own would be asked to make one."""
    home = next(base for base in kind.__mro__ if "_missing_" in vars(base))
    return home.__module__ != "enum" and all(member._value_ != value for member in kind.__members__.values())


def collide(keys: Iterable[object]) -> bool:
    """Whether so many keys have one hash that a set of them takes a time that grows with the square of their number."""
    return max(collections.Counter(map(hash, keys)).values(), default=0) > MAX_COLLIDING


def shadows_method(owner: object, name: str, value: Any) -> bool:
    """Whether ``value``, set on ``owner``, would be called in the place of a method.

    A method of the object itself may be: some choose their ``forward`` so.
    """
    of_torch = issubclass(type(owner), nn.Module) and name in vars(nn.Module)
    if type(value) is types.MethodType and value.__self__ is owner:
        return of_torch and name != "forward"
    there = in_class(type(owner), name)
    called = isinstance(there, _CALLED_BY_CLASSES) or (callable(there) and not isinstance(there, type))
    return callable(value) and (of_torch or called)


def slots_of(kind: type) -> list[str]:
    return [
        name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, types.MemberDescriptorType)
    ]


def own_getstate(kind: type) -> Callable[[Any], Any] | None:
    given = getattr(kind, "__getstate__", None)
    return given if given is not getattr(object, "__getstate__", None) else None
