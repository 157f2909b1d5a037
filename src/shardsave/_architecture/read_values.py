"""Reads Python values from the values of an architecture document."""

from __future__ import annotations

import base64
import functools
import pathlib
import types
from collections.abc import Mapping
from enum import Enum, Flag
from typing import Any

import numpy as np
import torch
from torch import nn

from shardsave._architecture.class_checks import (
    MAX_KEYS_PER_HASH,
    class_attribute,
    enum_member,
    flag_member,
    is_key,
    title,
    too_many_collide,
)
from shardsave._architecture.document import Document
from shardsave._architecture.imports import Imports
from shardsave._architecture.names import is_dunder
from shardsave._architecture.uses import Use, is_plain
from shardsave._common.strict_json import glimpse
from shardsave._common.words import an

#: The name of a number type of numpy → the Python type of its numbers in the document.
_SCALARS: Mapping[str, type] = {
    "bool": bool,
    **dict.fromkeys([f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)], int),
    **dict.fromkeys(["float16", "float32", "float64"], float),
}


class ValueReader:
    """Reads values. ``objects``: the objects of the table, all of which must exist before any value is read.

    ``imports``: the classes and functions that the document names; a use of one that is not trusted raises UntrustedCodeError. Every
    method raises CorruptCheckpointError.
    """

    def __init__(self, document: Document, imports: Imports) -> None:
        self.objects: list[Any] = []
        self._refuse = document.refuse
        self._imports = imports

    def class_of(self, name: object, base: type, use: Use) -> type:
        kind = self.imported(name, use)
        if not issubclass(type(kind), type) or not issubclass(kind, base):
            self._refuse(f"a subclass of {base.__name__} expected", f"{glimpse(name)} is not one")
        return kind  # type: ignore[no-any-return]

    def imported(self, name: object, use: Use) -> Any:
        if not isinstance(name, str) or name not in self._imports:
            self._refuse("names expected to be listed in imports", f"{glimpse(name)} is not")
        return self._imports.use(name, use)

    def named_items(self, node: dict[str, Any], group: str) -> list[tuple[str, Any]]:
        """The pairs of name and value in ``node[group]``, without names that Python reserves."""
        items = node.get(group, {})
        if not isinstance(items, dict):
            self._refuse(f"{group} expected to be an object", f"it is {glimpse(items)}")
        for name in items:
            if is_dunder(name):
                self._refuse(f"{group} expected to have no names that Python reserves", f"one is {glimpse(name)}")
        return list(items.items())

    def member(self, number: object, kind: type) -> Any:
        """The object ``number``, which must be an instance of ``kind``; None for null."""
        if number is None:
            return None
        value = self.object_at(number)
        if not issubclass(type(value), kind):
            self._refuse(f"{an(kind.__name__)} expected", f"object {number} is {an(title(type(value)))}")
        return value

    def object_at(self, number: object) -> Any:
        if type(number) is not int or not 0 <= number < len(self.objects):
            self._refuse(f"the number of an object, below {len(self.objects)}, expected", f"it is {glimpse(number)}")
        return self.objects[number]

    def values(self, values: object, length: int | None = None) -> list[Any]:
        if not isinstance(values, list) or (length is not None and len(values) != length):
            wanted = "a list of values" if length is None else f"{length} values"
            self._refuse(f"{wanted} expected", f"it is {glimpse(values)}")
        return [self.value(value) for value in values]

    def pairs(self, pairs: object) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self._refuse("pairs of a key and a value expected", f"it is {glimpse(pairs)}")
        keys = self.keys([self.value(key) for key, _ in pairs])
        return [(key, self.value(value)) for key, (_, value) in zip(keys, pairs)]

    def keys(self, keys: list[Any]) -> list[Any]:
        for key in keys:
            if not is_key(key):
                self._refuse("keys expected to be simple values", f"one is {an(title(type(key)))}")
        if too_many_collide(keys):
            self._refuse(f"at most {MAX_KEYS_PER_HASH} keys with the same hash expected", "there are more")
        return keys

    def value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is not dict or len(value) != 1:
            self._refuse("a value with one tag expected", f"it is {glimpse(value)}")
        [(tag, content)] = value.items()
        if tag == "ref":
            return self.object_at(content)
        read = getattr(self, f"_read_{tag}", None) if tag in _TAGS else None
        if read is None:
            self._refuse("a value with a known tag expected", f"it is {glimpse(value)}")
        try:
            return read(content)
        except RecursionError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, OverflowError):
            self._refuse(f"a {tag} expected", f"it is {glimpse(content)}")

    def _read_float(self, content: str) -> float:
        return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[content]

    def _read_complex(self, content: list[str]) -> complex:
        real, imaginary = content
        return complex(float(real), float(imaginary))

    def _read_bytes(self, content: str) -> bytes:
        return base64.b64decode(content, validate=True)

    def _read_tuple(self, content: Any) -> tuple[Any, ...]:
        return tuple(self.values(content))

    def _read_frozenset(self, content: Any) -> frozenset[Any]:
        return frozenset(self.keys(self.values(content)))

    def _read_size(self, content: Any) -> torch.Size:
        return torch.Size(self._integers(content))

    def _read_slice(self, content: Any) -> slice:
        return slice(*self.values(content, 3))

    def _read_range(self, content: Any) -> range:
        return range(*self._integers(content, 3))

    def _integers(self, content: Any, length: int | None = None) -> list[int]:
        """Accepts only values of type int: the caller would run ``__index__`` of any other object."""
        values = self.values(content, length)
        if not all(type(value) is int for value in values):
            raise TypeError("integers expected")
        return values

    def _read_ellipsis(self, content: Any) -> Any:
        return ...

    def _read_path(self, content: str) -> pathlib.Path:
        return pathlib.Path(content)

    def _read_device(self, content: str) -> torch.device:
        if not isinstance(content, str):
            self._refuse("a device expected", f"it is {glimpse(content)}")
        return torch.device(content)

    def _read_dtype(self, content: str) -> torch.dtype:
        return self._torch_constant(content, torch.dtype)  # type: ignore[no-any-return]

    def _read_layout(self, content: str) -> torch.layout:
        return self._torch_constant(content, torch.layout)  # type: ignore[no-any-return]

    def _read_memory_format(self, content: str) -> torch.memory_format:
        return self._torch_constant(content, torch.memory_format)  # type: ignore[no-any-return]

    def _torch_constant(self, name: str, kind: type) -> Any:
        constant = vars(torch).get(name)
        if not isinstance(constant, kind):
            self._refuse(f"a torch.{kind.__name__} expected", f"it is {glimpse(name)}")
        return constant

    def _read_import(self, content: Any) -> Any:
        return self.imported(content, Use.VALUE)

    def _read_enum(self, content: Any) -> Any:
        name, member = content
        value = enum_member(self.class_of(name, Enum, Use.MEMBER), member)
        if value is None:
            self._refuse("a member of an enum expected", f"it is {glimpse(content)}")
        return value

    def _read_flag(self, content: Any) -> Any:
        name, number = content
        if type(number) is not int:
            self._refuse("a flag with a number expected", f"it is {glimpse(number)}")
        kind = self.class_of(name, Flag, Use.MEMBER)
        value = flag_member(kind, number)
        if value is None:
            self._refuse(f"the value of a member of {title(kind)} expected", f"it is {number}")
        return value

    def _read_namedtuple(self, content: Any) -> Any:
        name, values = content
        kind = self.class_of(name, tuple, Use.TUPLE)
        fields = class_attribute(kind, "_fields")
        if type(fields) is not tuple:
            self._refuse("a named tuple expected", f"it is {glimpse(content)}")
        return tuple.__new__(kind, self.values(values, len(fields)))

    def _read_scalar(self, content: Any) -> Any:
        name, value = content
        number = self.value(value)
        if type(number) is not _SCALARS.get(name):
            self._refuse("the name of a numpy number type and a number expected", f"it is {glimpse(content)}")
        return np.dtype(name).type(number)

    def _read_partial(self, content: Any) -> Any:
        function, arguments, keywords = content
        if not isinstance(function, dict) or len(function) != 1 or not function.keys() <= {"import", "method"}:
            self._refuse("a partial of an import or a method expected", f"it is of {glimpse(function)}")
        if "import" in function and not (is_plain(arguments) and is_plain(keywords)):
            self.imported(function["import"], Use.BOUND)
        named = dict(self.pairs(keywords))
        return functools.partial(self.value(function), *self.values(arguments), **named)

    def _read_method(self, content: Any) -> Any:
        owner, name = content
        instance = self.value(owner)
        kind = type(instance)
        function = class_attribute(kind, name)
        if is_dunder(name) or name in vars(nn.Module) or type(function) is not types.FunctionType:
            self._refuse("a method of an object's own class expected", f"it is {glimpse(name)}")
        if not self._imports.names_of(kind):
            self._refuse("a method of an imported class expected", f"it is one of {title(kind)}")
        self._imports.use_method(kind, name)
        return types.MethodType(function, instance)


_TAGS = frozenset(name.removeprefix("_read_") for name in vars(ValueReader) if name.startswith("_read_"))
