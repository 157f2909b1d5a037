"""The document that `_architecture/describe.py` makes, read: its outline, and its values by their tags."""

from __future__ import annotations

import base64
import functools
import pathlib
import types
from collections.abc import Mapping
from enum import Enum, EnumMeta, Flag
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from shardsave._architecture.class_checks import MAX_COLLIDING, collide, in_class, is_key, made_up
from shardsave._architecture.describe import FORMAT
from shardsave._architecture.trust import is_dunder
from shardsave._common.strict_json import NotJSON, glimpse, parse_object
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, an

#: The numbers of numpy, and what in Python their values are.
_SCALARS: Mapping[str, type] = {
    "bool": bool,
    **dict.fromkeys([f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)], int),
    **dict.fromkeys(["float16", "float32", "float64"], float),
}

#: What a reader must know to build; nothing beyond version 1 yet.
SUPPORTED_FEATURES: frozenset[str] = frozenset()


class Document:
    """A checked outline of a document: what it imports, and its table of objects. Raises CorruptCheckpointError."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            top = parse_object(data)
        except NotJSON as refusal:
            self.bad(refusal.wanted, refusal.found)
        requires = top.get("requires")
        if top.get("format") != FORMAT or not isinstance(requires, list):
            self.bad(f"a document of format {FORMAT} expected", f"it is {glimpse(top.get('format'))}")
        if unknown := [feature for feature in requires if feature not in SUPPORTED_FEATURES]:
            raise IncompatibleCheckpointError(
                f"cannot build {where}: it requires {glimpse(unknown)}, which this version of shardsave does not know; "
                f"the checkpoint is intact, build it with a newer version"
            )
        self.imports: dict[str, str | None] = top.get("imports")  # type: ignore[assignment]
        self.objects: list[dict[str, Any]] = top.get("objects")  # type: ignore[assignment]
        if not isinstance(self.imports, dict) or not all(v is None or isinstance(v, str) for v in self.imports.values()):
            self.bad("imports expected to map names to versions", f"they are {glimpse(self.imports)}")
        if not isinstance(self.objects, list) or not self.objects or not all(type(node) is dict for node in self.objects):
            self.bad("objects expected to be a list of objects", f"they are {glimpse(self.objects)}")

    def bad(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was built")


class Values:
    """What stands for a value in a document → the value. ``made``: the table's objects, all of them there before any value is read."""

    def __init__(self, document: Document, found: Mapping[str, Any]) -> None:
        self.made: list[Any] = []
        self._bad = document.bad
        self._found = found

    def class_of(self, name: object, of: type) -> type:
        kind = self.imported(name)
        if not isinstance(kind, type) or not issubclass(kind, of):
            self._bad(f"a class of {of.__name__} expected", f"{glimpse(name)} is none")
        return kind

    def imported(self, name: object) -> Any:
        if not isinstance(name, str) or name not in self._found:
            self._bad("names expected to stand in imports", f"{glimpse(name)} does not")
        return self._found[name]

    def names(self, node: dict[str, Any], group: str) -> list[tuple[str, Any]]:
        given = node.get(group, {})
        if not isinstance(given, dict):
            self._bad(f"{group} expected to be an object", f"it is {glimpse(given)}")
        for name in given:
            if is_dunder(name):
                self._bad(f"{group} expected to have names of their own", f"{glimpse(name)} is Python's")
        return list(given.items())

    def member(self, place: object, kind: type) -> Any:
        if place is None:
            return None
        made = self.at(place)
        if not issubclass(type(made), kind):
            self._bad(f"{an(kind.__name__)} expected", f"object {place} is {an(type(made).__name__)}")
        return made

    def at(self, place: object) -> Any:
        if type(place) is not int or not 0 <= place < len(self.made):
            self._bad(f"a number below {len(self.made)} expected", f"it is {glimpse(place)}")
        return self.made[place]

    def values(self, values: object, length: int | None = None) -> list[Any]:
        if not isinstance(values, list) or (length is not None and len(values) != length):
            self._bad(
                "a list of values expected" if length is None else f"{length} values expected", f"it is {glimpse(values)}"
            )
        return [self.value(value) for value in values]

    def pairs(self, pairs: object) -> list[tuple[Any, Any]]:
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self._bad("pairs of a key and a value expected", f"it is {glimpse(pairs)}")
        keys = self.keys([self.value(key) for key, _ in pairs])
        return [(key, self.value(value)) for key, (_, value) in zip(keys, pairs)]

    def keys(self, values: list[Any]) -> list[Any]:
        for value in values:
            if not is_key(value):
                self._bad("keys expected to be simple values", f"one is {an(type(value).__qualname__)}")
        if collide(values):
            self._bad("keys of different hashes expected", f"more than {MAX_COLLIDING} have the same")
        return values

    def value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is not dict or len(value) != 1:
            self._bad("a value with one tag expected", f"it is {glimpse(value)}")
        [(tag, content)] = value.items()
        if tag == "ref":
            return self.at(content)
        read = getattr(self, f"_read_{tag}", None) if tag in _TAGS else None
        if read is None:
            self._bad("a value with a known tag expected", f"it is {glimpse(value)}")
        try:
            return read(content)
        except RecursionError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, OverflowError):
            self._bad(f"a {tag} expected", f"it is {glimpse(content)}")

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
        """Nothing that only says that it is one: it would be asked."""
        values = self.values(content, length)
        if not all(type(value) is int for value in values):
            raise TypeError("integers expected")
        return values

    def _read_ellipsis(self, content: Any) -> Any:
        return ...

    def _read_path(self, content: str) -> pathlib.Path:
        return pathlib.Path(content)

    def _read_device(self, content: str) -> torch.device:
        return (
            torch.device(content) if isinstance(content, str) else self._bad("a device expected", f"it is {glimpse(content)}")
        )

    def _read_dtype(self, content: str) -> torch.dtype:
        return self._of_torch(content, torch.dtype)  # type: ignore[no-any-return]

    def _read_layout(self, content: str) -> torch.layout:
        return self._of_torch(content, torch.layout)  # type: ignore[no-any-return]

    def _read_memory_format(self, content: str) -> torch.memory_format:
        return self._of_torch(content, torch.memory_format)  # type: ignore[no-any-return]

    def _of_torch(self, name: str, kind: type) -> Any:
        made = vars(torch).get(name)
        if not isinstance(made, kind):
            self._bad(f"a {kind.__name__} of torch expected", f"it is {glimpse(name)}")
        return made

    def _read_import(self, content: Any) -> Any:
        return self.imported(content)

    def _read_enum(self, content: Any) -> Any:
        name, member = content
        return self.class_of(name, Enum).__members__[member]  # type: ignore[attr-defined]

    def _read_flag(self, content: Any) -> Any:
        name, value = content
        if type(value) is not int:
            self._bad("a flag with a number expected", f"it is {glimpse(value)}")
        kind = self.class_of(name, Flag)
        if made_up(kind, value):
            self._bad(f"a member of {kind.__qualname__} expected", f"{value} is none")
        return EnumMeta.__call__(kind, value)  # a metaclass may have a call of its own

    def _read_namedtuple(self, content: Any) -> Any:
        name, values = content
        kind = self.class_of(name, tuple)
        items = self.values(values, len(kind._fields))  # type: ignore[attr-defined]
        return tuple.__new__(kind, items)

    def _read_scalar(self, content: Any) -> Any:
        name, value = content
        number = self.value(value)
        if type(number) is not _SCALARS.get(name):
            self._bad("a number of numpy expected", f"it is {glimpse(content)}")
        return np.dtype(name).type(number)

    def _read_partial(self, content: Any) -> Any:
        function, arguments, keywords = content
        if not isinstance(function, dict) or not function.keys() <= {"import", "method"}:
            self._bad("a partial of what is imported expected", f"it is of {glimpse(function)}")
        named = dict(self.pairs(keywords))
        return functools.partial(self.value(function), *self.values(arguments), **named)

    def _read_method(self, content: Any) -> Any:
        owner, name = content
        instance = self.value(owner)
        function = in_class(type(instance), name)
        if is_dunder(name) or name in vars(nn.Module) or not isinstance(function, types.FunctionType):
            self._bad("a method of an object's own class expected", f"it is {glimpse(name)}")
        if type(instance) not in self._found.values():
            self._bad("a method of what is imported expected", f"it is of a {type(instance).__qualname__}")
        return types.MethodType(function, instance)


_TAGS = frozenset(name.removeprefix("_read_") for name in vars(Values) if name.startswith("_read_"))
