"""Questions about classes and objects, answered without running any of their code.

An object may hold values from a file, and its class may define ``__getattribute__``, ``__class__`` or ``__iter__``. So the
answers come from the type of an object and from the attributes of its class.
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

FUNCTION_TYPES = (types.FunctionType, types.BuiltinFunctionType)

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was created by a class statement
_CONTAINERS = (collections.OrderedDict, dict, list, set)
_KEY_TYPES = frozenset(
    [type(None), bool, int, float, str, bytes, complex, range, pathlib.PosixPath, torch.dtype, torch.device, *FUNCTION_TYPES]
)
_KEY_BASES = (enum.Enum, type, np.generic)
MAX_KEYS_PER_HASH = 100

_METHOD_TYPES = (classmethod, staticmethod, functools.partialmethod, functools.singledispatchmethod)


def class_attribute(kind: type, name: str) -> Any:
    """The attribute ``name`` of ``kind`` or of a base, without calling descriptors or a metaclass; None if there is none."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def has_finaliser(kind: type) -> bool:
    """Whether code of ``kind`` runs when an instance is destroyed."""
    return any("__del__" in vars(base) for base in kind.__mro__)


def container_base(kind: type) -> type:
    """The built-in container that ``kind`` derives from; ``object`` if there is none."""
    return next((base for base in _CONTAINERS if issubclass(kind, base)), object)


def is_key(value: object) -> bool:
    """Whether a set or a dict looks ``value`` up by its value, and not by its identity."""
    kind = type(value)
    if kind in _KEY_TYPES:
        return True
    if issubclass(kind, (tuple, frozenset)):
        elements: Iterable[object] = (tuple if issubclass(kind, tuple) else frozenset).__iter__(value)  # type: ignore[arg-type]
        return _hashed_by_python(kind) and all(map(is_key, elements))
    return issubclass(kind, _KEY_BASES) and _hashed_by_python(kind)


def _hashed_by_python(kind: type) -> bool:
    """Whether ``__hash__`` and ``__eq__`` of ``kind`` are Python's own, so that a lookup runs no code of the class."""
    owners = (next(base for base in kind.__mro__ if name in vars(base)) for name in ("__hash__", "__eq__"))
    return all(owner.__module__ == "enum" or not owner.__flags__ & HEAP_TYPE for owner in owners)


def calls_missing(kind: type[enum.Flag], value: int) -> bool:
    """Whether ``kind(value)`` would call a ``_missing_`` that the class defines itself, since no member has this value."""
    owner = next(base for base in kind.__mro__ if "_missing_" in vars(base))
    return owner.__module__ != "enum" and all(member._value_ != value for member in kind.__members__.values())


def too_many_collide(keys: Iterable[object]) -> bool:
    """Whether too many keys have the same hash: the time to build a set of them grows with the square of their number."""
    return max(collections.Counter(map(hash, keys)).values(), default=0) > MAX_KEYS_PER_HASH


def shadows_method(owner: object, name: str, value: Any) -> bool:
    """Whether ``value``, set as attribute ``name`` of ``owner``, would be called instead of a method.

    A method of the object itself is allowed: some modules choose their ``forward`` that way.
    """
    of_nn_module = issubclass(type(owner), nn.Module) and name in vars(nn.Module)
    if type(value) is types.MethodType and value.__self__ is owner:
        return of_nn_module and name != "forward"
    original = class_attribute(type(owner), name)
    is_method = isinstance(original, _METHOD_TYPES) or (callable(original) and not isinstance(original, type))
    return callable(value) and (of_nn_module or is_method)


def slots_of(kind: type) -> list[str]:
    return [
        name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, types.MemberDescriptorType)
    ]


def own_getstate(kind: type) -> Callable[[Any], Any] | None:
    """The ``__getstate__`` that ``kind`` or a base defines; None if there is only that of ``object``."""
    getstate = getattr(kind, "__getstate__", None)
    return getstate if getstate is not getattr(object, "__getstate__", None) else None
