"""Extra state that is no tensor, out of the architecture beside the weights: plain data alone, nothing is imported for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from shardsave._architecture.describe import DICT_TYPES
from shardsave._architecture.read_values import Document, Values
from shardsave._state.module import EXTRA_STATE

_PLAIN_DICTS = {"dict": dict, **{name: kind for name, kind in DICT_TYPES.items() if name != "defaultdict"}}


class NotPlain(Exception):
    """What was met is a tensor, or an object of some class."""


def extra_states(document: Document, names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Of ``names``, such as ``layer._extra_state``, those that the document has, with their values; and those that are no plain data.

    Raises CorruptCheckpointError.
    """
    found, others = {}, []
    values = _PlainValues(document)
    for name in names:
        node = _module(document, name.removesuffix(EXTRA_STATE).removesuffix("."))
        if node is None or "extra_state" not in node:
            continue
        try:
            found[name] = values.value(node["extra_state"])
        except (NotPlain, RecursionError):
            others.append(name)
    return found, others


def _module(document: Document, path: str) -> dict[str, Any] | None:
    """The module at ``path`` in the document's table."""
    node = document.objects[0]
    for part in path.split(".") if path else ():
        children = node.get("children")
        place = children.get(part) if isinstance(children, dict) else None
        if type(place) is not int or not 0 <= place < len(document.objects):
            return None
        node = document.objects[place]
    return node


class _PlainValues(Values):
    """Makes the containers of the table when they are asked for, and nothing else of it."""

    def __init__(self, document: Document) -> None:
        super().__init__(document, {})
        self._document = document
        self._there: dict[int, Any] = {}

    def at(self, place: object) -> Any:
        if type(place) is not int or not 0 <= place < len(self._document.objects):
            self._bad(f"a number below {len(self._document.objects)} expected", f"it is {place!r}")
        if place in self._there:
            return self._there[place]
        node = self._document.objects[place]
        if "list" in node:
            made: Any = []
            self._there[place] = made
            made.extend(self.values(node["list"]))
        elif "set" in node:
            made = self._there[place] = set(self.keys(self.values(node["set"])))
        elif "dict" in node and str(node.get("type", "dict")) in _PLAIN_DICTS:
            made = self._there[place] = _PLAIN_DICTS[str(node.get("type", "dict"))]()
            for key, value in self.pairs(node["dict"]):
                made[key] = value
        else:
            raise NotPlain
        return made

    def imported(self, name: object) -> NoReturn:
        raise NotPlain
