"""Reads extra state (``get_extra_state``) that is not a tensor from an architecture: only plain data, and nothing is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from shardsave._architecture.document import DICT_TYPES, Document
from shardsave._architecture.imports import Imports
from shardsave._architecture.read_values import ValueReader
from shardsave._architecture.trust import Trust
from shardsave._architecture.uses import Use
from shardsave._common.strict_json import glimpse
from shardsave._state.module import EXTRA_STATE

_PLAIN_DICTS = {"dict": dict, **{name: kind for name, kind in DICT_TYPES.items() if name != "defaultdict"}}


class NotPlain(Exception):
    """The value contains a tensor, or an instance of some class."""


def extra_states(document: Document, names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Reads the extra states ``names``, such as ``layer._extra_state``. Raises CorruptCheckpointError.

    Returns name → value for those that are plain data, and the names of those that are not. Names that the document lacks are in neither.
    """
    plain, not_plain = {}, []
    reader = _PlainValueReader(document)
    for name in names:
        node = _module_node(document, name.removesuffix(EXTRA_STATE).removesuffix("."))
        if node is None or "extra_state" not in node:
            continue
        try:
            plain[name] = reader.value(node["extra_state"])
        except (NotPlain, RecursionError):
            not_plain.append(name)
    return plain, not_plain


def _module_node(document: Document, path: str) -> dict[str, Any] | None:
    """The module at ``path``, as the table of the document has it; None if there is none."""
    node = document.objects[0]
    for name in path.split(".") if path else ():
        children = node.get("children")
        number = children.get(name) if isinstance(children, dict) else None
        if type(number) is not int or not 0 <= number < len(document.objects):
            return None
        node = document.objects[number]
    return node


class _PlainValueReader(ValueReader):
    """Builds an object of the table when a value refers to it, and only if it is a plain container."""

    def __init__(self, document: Document) -> None:
        super().__init__(document, Imports({}, Trust(), document.where))
        self._document = document
        self._built: dict[int, Any] = {}

    def object_at(self, number: object) -> Any:
        if type(number) is not int or not 0 <= number < len(self._document.objects):
            self._refuse(f"the number of an object, below {len(self._document.objects)}, expected", f"it is {glimpse(number)}")
        if number in self._built:
            return self._built[number]
        node = self._document.objects[number]
        if "list" in node:
            container: Any = []
            self._built[number] = container
            container.extend(self.values(node["list"]))
        elif "set" in node:
            container = self._built[number] = set(self.keys(self.values(node["set"])))
        elif "dict" in node and str(node.get("type", "dict")) in _PLAIN_DICTS:
            container = self._built[number] = _PLAIN_DICTS[str(node.get("type", "dict"))]()
            for key, value in self.pairs(node["dict"]):
                container[key] = value
        else:
            raise NotPlain
        return container

    def imported(self, name: object, use: Use) -> NoReturn:
        raise NotPlain
