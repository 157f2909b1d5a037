"""What a document asks for: each class and function that it names, and what it would be used for. Imports nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

from shardsave._architecture.names import is_dunder


class Use(Enum):
    """What a document uses a class or a function for."""

    MODULE = "a module"
    OBJECT = "an instance"
    MEMBER = "a member of an enum"
    TUPLE = "a named tuple"
    VALUE = "a value that the model can call"
    BOUND = "a value that is called with more than plain values"
    EXTRA_STATE = "a module with extra state"
    COMPUTED = "a module with computed tensors"


class Uses:
    """``names``: each name in ``imports`` → its uses. ``methods``: pairs of the name of a class and a method that is used as a value.

    Looks for values everywhere in the table, so it may find one where the builder reads none. It never misses one.
    """

    def __init__(self, imports: Iterable[str], objects: list[dict[str, Any]]) -> None:
        self.names: dict[str, set[Use]] = {name: set() for name in imports}
        self.methods: dict[tuple[str, str], None] = {}
        self._objects = objects
        for node in objects:
            kind = node.get("module")
            self._add(kind, Use.MODULE)
            self._add(node.get("object"), Use.OBJECT)
            if "extra_state" in node:
                self._add(kind, Use.EXTRA_STATE)
            if "parametrized" in node:
                self._add(kind, Use.COMPUTED)
        self._find_values(objects)

    def _add(self, name: object, use: Use) -> None:
        if isinstance(name, str) and name in self.names:
            self.names[name].add(use)

    def _find_values(self, objects: list[dict[str, Any]]) -> None:
        waiting: list[Any] = list(objects)
        while waiting:
            value = waiting.pop()
            if isinstance(value, list):
                waiting.extend(value)
            elif isinstance(value, dict):
                waiting.extend(value.values())
                if len(value) == 1:
                    [(tag, content)] = value.items()
                    self._find_value(tag, content)

    def _find_value(self, tag: str, content: Any) -> None:
        if tag == "import":
            self._add(content, Use.VALUE)
        if not isinstance(content, list) or not content:
            return
        if tag in ("enum", "flag"):
            self._add(content[0], Use.MEMBER)
        elif tag == "namedtuple":
            self._add(content[0], Use.TUPLE)
        elif tag == "partial" and isinstance(content[0], dict) and not all(map(is_plain, content[1:])):
            self._add(content[0].get("import"), Use.BOUND)
        elif tag == "method" and len(content) == 2:
            owner, method = self._class_of(content[0]), content[1]
            if owner is not None and isinstance(method, str) and method.isidentifier() and not is_dunder(method):
                self.methods[owner, method] = None

    def _class_of(self, value: Any) -> str | None:
        """The name of the class of ``value``; None if it is not in ``imports``."""
        name: Any = None
        if isinstance(value, dict) and len(value) == 1:
            [(tag, content)] = value.items()
            if tag == "ref" and type(content) is int and 0 <= content < len(self._objects):
                node = self._objects[content]
                name = node.get("module", node.get("object"))
            elif tag in ("enum", "flag", "namedtuple") and isinstance(content, list) and content:
                name = content[0]
        return name if isinstance(name, str) and name in self.names else None


#: Tags of values that contain no object of the table and nothing that can be called, and those that do so if their parts do.
_PLAIN = frozenset(
    ["float", "complex", "bytes", "ellipsis", "dtype", "device", "layout", "memory_format", "path", "scalar", "size", "range"]
)
_SEQUENCES = frozenset(["tuple", "frozenset", "slice"])


def is_plain(value: Any) -> bool:
    """Whether values of a document, in lists of any depth, refer to no object of the table and to nothing that can be called."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            if len(value) != 1:
                return False
            [(tag, content)] = value.items()
            if tag in _SEQUENCES:
                waiting.append(content)
            elif tag not in _PLAIN:
                return False
    return True
