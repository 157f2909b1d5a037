"""Values of Python as data, and a table of those that have an identity: what is shared stays shared, and cycles are no matter."""

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

from shardsave._architecture.kinds import FUNCTIONS, MAX_COLLIDING, collide, is_key, made_up
from shardsave._architecture.trust import dotted, is_dunder, name_of, why_not_made
from shardsave._common.strict_json import MAX_DIGITS
from shardsave._state.wrappers import unwrap

#: Tuples and other values that have no place in the table, inside of each other.
_MAX_DEPTH = 100


class TableWriter:
    """Writes values. What has an identity gets a number in ``objects``, and waits in a queue to be written there: no depth of a model
    reaches the depth of Python's stack. ``refused``: all that cannot be kept, each with its place."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.imports: set[str] = set()
        self.refused: list[str] = []
        self._depth = 0
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []  # an id is that of one object only while the object lives
        self._queue: collections.deque[tuple[int, Any, str]] = collections.deque()

    def _number(self, thing: Any, path: str) -> int:
        number = self._numbers.get(id(thing))
        if number is None:
            number = self._numbers[id(thing)] = len(self.objects)
            self._alive.append(thing)
            self.objects.append(None)
            self._queue.append((number, thing, path))
        return number

    def _refuse(self, path: str, found: str) -> None:
        self.refused.append(f"{path}: {found}")

    def _import(self, thing: Any, path: str) -> str:
        name = name_of(thing)
        if name is None:
            self._refuse(path, _nameless(thing))
            return ""
        if why := why_not_made(thing):
            self._refuse(path, f"a {dotted(name)}: {why}")
        self.imports.add(name)
        return name

    def _values(self, things: Iterable[Any], path: str) -> list[Any]:
        return [self._value(thing, f"{path}[{place}]") for place, thing in enumerate(things)]

    def _pairs(self, things: Mapping[Any, Any], path: str) -> list[list[Any]]:
        keys = self._keys(things, path)
        return [[key, self._value(value, f"{path}[{_short(name)}]")] for key, (name, value) in zip(keys, things.items())]

    def _keys(self, given: Iterable[Any], path: str) -> list[Any]:
        """What can be looked up by its value alone: an object is another one when it is built again."""
        made, things = [], list(given)
        for thing in things:
            if not is_key(thing):
                self._refuse(path, f"a key or element {_short(thing)}, which is looked up by what it is and not by its value")
                continue
            made.append(self._value(thing, f"{path}, a key"))
        if len(made) == len(things) and collide(things):
            self._refuse(path, f"more than {MAX_COLLIDING} keys or elements of one hash")
        return made

    def _value(self, thing: Any, path: str) -> Any:
        if self._depth == _MAX_DEPTH:
            self._refuse(path, f"values nested more than {_MAX_DEPTH} deep, each one inside of another")
            return None
        self._depth += 1
        try:
            return self._written(thing, path)
        finally:
            self._depth -= 1

    def _written(self, thing: Any, path: str) -> Any:
        kind = type(thing)
        if thing is None or kind is bool:
            return thing
        if kind is str:
            return self._text(thing, path)
        if kind is int:
            if abs(thing) >= 10**MAX_DIGITS:
                self._refuse(path, f"a number of more than {MAX_DIGITS} digits")
            return thing
        if kind is float:
            return thing if math.isfinite(thing) else {"float": repr(thing)}
        simple = _SIMPLE.get(kind)
        if simple is not None:
            tag, value = simple
            return {tag: value(thing)}
        if kind is frozenset:
            return {"frozenset": self._keys(thing, path)}
        if kind in (tuple, torch.Size):
            return {"size" if kind is torch.Size else "tuple": self._values(thing, path)}
        if kind is slice:
            return {"slice": self._values((thing.start, thing.stop, thing.step), path)}
        if kind is functools.partial:
            call = [self._value(thing.func, f"{path}.func"), self._values(thing.args, path), self._pairs(thing.keywords, path)]
            return {"partial": call}
        return self._named(thing, path)

    def _named(self, thing: Any, path: str) -> Any:
        """What is named rather than described: classes, functions, members of an enum, methods; all else goes to the table."""
        if isinstance(thing, enum.Flag):
            if made_up(type(thing), thing.value):
                self._refuse(path, f"{thing!r}, which has no name in its enum")
            return {"flag": [self._import(type(thing), path), thing.value]}
        if isinstance(thing, enum.Enum):
            if thing.name not in type(thing).__members__:
                self._refuse(path, f"{thing!r}, which has no name in its enum")
            return {"enum": [self._import(type(thing), path), thing.name]}
        if isinstance(thing, (type, *FUNCTIONS)):
            return {"import": self._import(thing, path)}
        if isinstance(thing, types.MethodType):
            own = next(
                (vars(base)[thing.__name__] for base in type(thing.__self__).__mro__ if thing.__name__ in vars(base)), None
            )
            if own is not thing.__func__:
                self._refuse(path, f"the method {thing.__name__}, which its class does not have; define it in the class")
                return None
            if vars(nn.Module).get(thing.__name__) is None and not is_dunder(thing.__name__):
                return {"method": [self._value(thing.__self__, path), thing.__name__]}
            self._refuse(path, f"the method {thing.__name__} of every module")
            return None
        if isinstance(thing, tuple) and hasattr(thing, "_fields"):
            return {"namedtuple": [self._import(type(thing), path), self._values(thing, path)]}
        if isinstance(thing, np.generic) and thing.dtype.kind in "biuf" and thing.dtype.itemsize <= 8:
            return {"scalar": [thing.dtype.name, self._value(thing.item(), path)]}
        if isinstance(thing, nn.Module):
            thing = unwrap(thing)
        return {"ref": self._number(thing, path)}

    def _text(self, text: str, path: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse(path, "text with half of a surrogate pair")
        return text


_SIMPLE: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
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


def _nameless(thing: Any) -> str:
    if isinstance(thing, types.FunctionType):
        code = thing.__code__
        where = f"{pathlib.PurePath(code.co_filename).name}:{code.co_firstlineno}"
        if thing.__name__ == "<lambda>":
            return f"lambda at {where}; use a named function"
        return f"function {thing.__qualname__} at {where}, which cannot be imported; define it at the top of a module"
    if isinstance(thing, type):
        return f"class {thing.__module__}.{thing.__qualname__}, which cannot be imported; define it at the top of a module"
    return f"{thing!r}, which cannot be imported"


def _short(thing: object) -> str:
    return reprlib.repr(thing)
