"""Questions about classes and objects, answered without running any of their code.

An object may hold values from a file, and its class may define ``__getattribute__``, ``__class__`` or ``__iter__``. So the
answers come from the type of an object and from the attributes of its class. A class may have a metaclass that does the same, so
attributes of a class are read with the descriptors of ``type`` itself.
"""

from __future__ import annotations

import collections
import enum
import functools
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
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

#: What Python calls of a flag to combine its members.
_COMBINES = frozenset([
    "_missing_", "__new_member__", "_iter_member_", "_create_pseudo_member_", "_numeric_repr_", "_decompose", "__new__",
    "__setattr__", "__getattribute__", "__getattr__",
])  # fmt: skip

_METHOD_TYPES = (classmethod, staticmethod, functools.partialmethod, functools.singledispatchmethod)


def bases_of(kind: type) -> tuple[type, ...]:
    """``kind.__mro__``."""
    return type.__dict__["__mro__"].__get__(kind)  # type: ignore[no-any-return]


def namespace(kind: type) -> Mapping[str, Any]:
    """``vars(kind)``."""
    return type.__dict__["__dict__"].__get__(kind)  # type: ignore[no-any-return]


def module_of(kind: type) -> str:
    """``kind.__module__``."""
    return str(type.__dict__["__module__"].__get__(kind))


def title(kind: type) -> str:
    """``kind.__qualname__``."""
    return str(type.__dict__["__qualname__"].__get__(kind))


def owner_of(kind: type, name: str) -> type | None:
    """The class, ``kind`` or a base, that defines the attribute ``name``; None if there is none."""
    return next((base for base in bases_of(kind) if name in namespace(base)), None)


def class_attribute(kind: type, name: str) -> Any:
    """The attribute ``name`` of ``kind`` or of a base, without calling descriptors or a metaclass; None if there is none."""
    owner = owner_of(kind, name)
    return namespace(owner)[name] if owner is not None else None


def instance_dict(instance: object) -> dict[str, Any] | None:
    """``vars(instance)``; None if it has none, or if its class has a property in its place."""
    descriptor = class_attribute(type(instance), "__dict__")
    return descriptor.__get__(instance) if type(descriptor) is types.GetSetDescriptorType else None


def has_finaliser(kind: type) -> bool:
    """Whether code of ``kind`` runs when an instance is destroyed."""
    return owner_of(kind, "__del__") is not None


def is_heap_type(kind: type) -> bool:
    """Whether ``kind`` was created by a class statement, so that its methods are Python code."""
    return bool(type.__dict__["__flags__"].__get__(kind) & HEAP_TYPE)


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
    """Whether a lookup runs no code of ``kind``: what it calls is Python's own."""
    owners = (owner_of(kind, name) for name in ("__hash__", "__eq__", "__getattribute__"))  # an enum looks up its ``_name_``
    return all(owner is not None and (module_of(owner) == "enum" or not is_heap_type(owner)) for owner in owners)


def enum_member(kind: type, name: object) -> Any:
    """The member ``name`` of the enum ``kind``; None if there is none."""
    return class_attribute(kind, "_member_map_").get(name)


def flag_member(kind: type, value: int) -> Any:
    """The member or the combination of members of the flag ``kind`` that has this value.

    None if no member has it and code of the class would run to combine members.
    """
    member = class_attribute(kind, "_value2member_map_").get(value)
    if any(named is member for named in class_attribute(kind, "_member_map_").values()):  # combinations are kept there too
        return member
    if type(kind) is not enum.EnumMeta or not all(map(_of_enum, _own_routines(kind))):
        return None
    return enum.EnumMeta.__call__(kind, value)  # type: ignore[arg-type]


def _own_routines(kind: type) -> Iterator[Any]:
    """What Python would call to combine members of the flag ``kind``, except for what the module ``enum`` itself defines."""
    for base in bases_of(kind):
        if is_heap_type(base) and module_of(base) != "enum":
            yield from (namespace(base)[name] for name in _COMBINES & namespace(base).keys())


def _of_enum(routine: Any) -> bool:
    """Whether ``routine`` is a function of the module ``enum``, which copies some of its own to the classes that it makes."""
    function = routine.__func__ if type(routine) in (classmethod, staticmethod, types.MethodType) else routine
    return type(function) is types.FunctionType and function.__globals__ is vars(enum)


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
    is_method = issubclass(type(original), _METHOD_TYPES) or (callable(original) and not issubclass(type(original), type))
    return callable(value) and (of_nn_module or is_method)


def slots_of(kind: type) -> list[str]:
    return [
        name for base in bases_of(kind) for name, value in namespace(base).items() if type(value) is types.MemberDescriptorType
    ]


def own_getstate(kind: type) -> Callable[[Any], Any] | None:
    """The ``__getstate__`` that ``kind`` or a base defines; None if there is only that of ``object``."""
    getstate = getattr(kind, "__getstate__", None)
    return getstate if getstate is not getattr(object, "__getstate__", None) else None
