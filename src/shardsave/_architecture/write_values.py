"""Writes Python values as values of an architecture document, with a table of the objects that have an identity."""

from __future__ import annotations

import base64
import collections
import enum
import functools
import math
import pathlib
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from shardsave._architecture.class_checks import (
    FUNCTION_TYPES,
    MAX_KEYS_PER_HASH,
    class_attribute,
    flag_member,
    is_key,
    too_many_collide,
)
from shardsave._architecture.names import dotted, is_dunder, name_of, why_no_value
from shardsave._architecture.routines import why_unsafe
from shardsave._common.strict_json import MAX_DIGITS
from shardsave._state.wrappers import unwrap

#: How deep values without a number in the table, such as tuples, may be nested.
_MAX_DEPTH = 100


def in_order(elements: Iterable[Any]) -> list[Any]:
    """The elements of a set, in an order that all processes share: its own depends on hashes of texts, which each process makes anew."""
    return sorted(elements, key=_place)


def _place(element: Any) -> str:
    if isinstance(element, frozenset):
        return f"frozenset {sorted(map(_place, element))}"
    if isinstance(element, tuple):
        return f"tuple {[*map(_place, element)]}"
    return f"{type(element).__qualname__} {element!r}"


class ValueWriter:
    """Writes values. An object with an identity gets a number in ``objects`` and waits in a queue until it is written there, so that
    a deep model does not exhaust Python's stack.

    ``imports``: name → class or function. ``refused`` lists everything that cannot be saved, with its path in the module.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.imports: dict[str, Any] = {}
        self.refused: list[str] = []
        self._depth = 0
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # an id is unique only while its object lives
        self._queue: collections.deque[tuple[int, Any, str]] = collections.deque()

    def _number(self, value: Any, path: str) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.objects)
            self._alive.append(value)
            self.objects.append(None)
            self._queue.append((number, value, path))
        return number

    def _refuse(self, path: str, reason: str) -> None:
        self.refused.append(f"{path}: {reason}")

    def _import(self, target: Any, path: str) -> str:
        name = name_of(target)
        if name is None:
            self._refuse(path, _why_nameless(target))
            return ""
        if reason := why_unsafe(target) or why_no_value(name, target):
            self._refuse(path, f"a {dotted(name)}: {reason}")
        self.imports[name] = target
        return name

    def _values(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self._value(value, f"{path}[{place}]") for place, value in enumerate(values)]

    def _pairs(self, mapping: Mapping[Any, Any], path: str) -> list[list[Any]]:
        keys = self._keys(mapping, path)
        return [[key, self._value(value, f"{path}[{_short(name)}]")] for key, (name, value) in zip(keys, mapping.items())]

    def _keys(self, keys: Iterable[Any], path: str) -> list[Any]:
        """Refuses keys that are looked up by identity: the built key is a new object, which no lookup by the old one finds."""
        written, keys = [], list(keys)
        for key in keys:
            if not is_key(key):
                self._refuse(path, f"a key or element {_short(key)}, which is looked up by identity and not by value")
                continue
            written.append(self._value(key, f"{path}, a key"))
        if len(written) == len(keys) and too_many_collide(keys):
            self._refuse(path, f"more than {MAX_KEYS_PER_HASH} keys or elements with the same hash")
        return written

    def _value(self, value: Any, path: str) -> Any:
        if self._depth == _MAX_DEPTH:
            self._refuse(path, f"values nested more than {_MAX_DEPTH} levels deep")
            return None
        self._depth += 1
        try:
            return self._scalar_or_other(value, path)
        finally:
            self._depth -= 1

    def _scalar_or_other(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return self._text(value, path)
        if kind is int:
            if abs(value) >= 10**MAX_DIGITS:
                self._refuse(path, f"a number of more than {MAX_DIGITS} digits")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind in _ENCODERS:
            tag, encode = _ENCODERS[kind]
            return {tag: encode(value)}
        if kind is frozenset:
            return {"frozenset": self._keys(in_order(value), path)}
        if kind in (tuple, torch.Size):
            return {"size" if kind is torch.Size else "tuple": self._values(value, path)}
        if kind is slice:
            return {"slice": self._values((value.start, value.stop, value.step), path)}
        if kind is functools.partial:
            call = [self._value(value.func, f"{path}.func"), self._values(value.args, path), self._pairs(value.keywords, path)]
            return {"partial": call}
        return self._named_or_numbered(value, path)

    def _named_or_numbered(self, value: Any, path: str) -> Any:
        """Classes, functions, enum members and methods are written by name; everything else gets a number in the table."""
        if isinstance(value, enum.Flag):
            if flag_member(type(value), value.value) is None:
                self._refuse(path, f"{value!r}, which has no name in its enum")
            return {"flag": [self._import(type(value), path), value.value]}
        if isinstance(value, enum.Enum):
            if value.name not in type(value).__members__:
                self._refuse(path, f"{value!r}, which has no name in its enum")
            return {"enum": [self._import(type(value), path), value.name]}
        if isinstance(value, (type, *FUNCTION_TYPES)):
            return {"import": self._import(value, path)}
        if isinstance(value, types.MethodType):
            return self._method(value, path)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"namedtuple": [self._import(type(value), path), self._values(value, path)]}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            return {"scalar": [value.dtype.name, self._value(value.item(), path)]}
        if isinstance(value, nn.Module):
            value = unwrap(value)
        return {"ref": self._number(value, path)}

    def _method(self, method: types.MethodType, path: str) -> Any:
        name = method.__name__
        if class_attribute(type(method.__self__), name) is not method.__func__:
            self._refuse(path, f"the method {name}, which its class does not have; define it in the class")
            return None
        if vars(nn.Module).get(name) is not None or is_dunder(name):
            self._refuse(path, f"the method {name}, which every module has")
            return None
        return {"method": [self._value(method.__self__, path), name]}

    def _text(self, text: str, path: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse(path, "text with half of a surrogate pair")
        return text


#: Type → tag, and the function that encodes a value for this tag.
_ENCODERS: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
    complex: ("complex", lambda value: [repr(value.real), repr(value.imag)]),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
    range: ("range", lambda value: [value.start, value.stop, value.step]),
    type(...): ("ellipsis", lambda value: True),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch.")),
    torch.device: ("device", str),
    torch.layout: ("layout", lambda value: str(value).removeprefix("torch.")),
    torch.memory_format: ("memory_format", lambda value: str(value).removeprefix("torch.")),
    pathlib.PosixPath: ("path", str),
}


def _why_nameless(target: Any) -> str:
    if isinstance(target, types.FunctionType):
        code = target.__code__
        where = f"{pathlib.PurePath(code.co_filename).name}:{code.co_firstlineno}"
        if target.__name__ == "<lambda>":
            return f"lambda at {where}; use a named function"
        return f"function {target.__qualname__} at {where}, which cannot be imported; define it at the top of a module"
    if isinstance(target, type):
        return f"class {target.__module__}.{target.__qualname__}, which cannot be imported; define it at the top of a module"
    return f"{target!r}, which cannot be imported"


def _short(value: object) -> str:
    return reprlib.repr(value)
