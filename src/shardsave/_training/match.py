"""Matches a live training state with a saved one: which leaf continues which, what is missing, and what is plain data."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from shardsave._common.strict_json import glimpse
from shardsave._common.words import an, some
from shardsave._training.distributed import TAG as BOXES
from shardsave._training.kinds import class_name, items_of, kind_of, leaves_in
from shardsave._training.leaves import LeafPlanner
from shardsave._training.per_rank import PerRank
from shardsave._training.places import RNG, ROOT, Place
from shardsave._training.read_values import ValueReader
from shardsave._training.subclasses import TAG as SUBCLASS
from shardsave._training.write_values import MAX_DEPTH

#: The tags of values with a state of their own, or in memory that exists: they are leaves; everything else is plain data.
_LEAVES = frozenset({"optimizer", "module", "object", "generator", "tensor", "array", SUBCLASS, BOXES, "per_rank"})
_ABSENT: Any = object()

#: The tags of containers → what they are, in words.
_CONTAINERS = {"dict": "a dict", "pairs": "a dict", "list": "a list", "tuple": "a tuple", "set": "a set"}


class Matcher:
    """Walks over the live and the saved structure together.

    ``missing``, ``unexpected``, ``differences``: leaves of which only one side has a state, or that differ, in words. ``notes``: the rest.
    """

    def __init__(
        self,
        reader: ValueReader,
        leaves: LeafPlanner,
        rank_leaves: Mapping[str, Any] | None,
        *,
        only: Collection[str] | None,
        skip: Collection[str],
    ) -> None:
        """``rank_leaves``: key → the JSON of what belongs to this rank; None with another number of ranks."""
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.differences: list[str] = leaves.differences
        self.notes: list[str] = leaves.notes
        self.leaves = leaves
        self._reader = reader
        self._rank_leaves = rank_leaves
        self._only = only
        self._skip = skip
        self._seen = {RNG.name}
        self._depth = 0

    def match(self, live: Any, saved: Any, place: Place = ROOT) -> Any:
        """Plans the leaves of ``live``. Returns it with plain data as in ``saved``."""
        if self._depth > MAX_DEPTH:
            self._reader.corrupt(place.path, f"values nested at most {MAX_DEPTH} levels deep were", saved)
        self._depth += 1
        try:
            return self._match(live, saved, place)
        finally:
            self._depth -= 1

    def selected(self, place: Place) -> bool:
        """Whether ``only`` and ``skip`` leave the leaf at ``place`` to be restored."""
        parts = place.name.split("/")
        names = {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
        self._seen |= names
        return names.isdisjoint(self._skip) and (self._only is None or not names.isdisjoint(self._only))

    def check_selection(self) -> None:
        """Raises ValueError for a name in ``only`` or ``skip`` that is in neither structure."""
        for argument, names in (("only", self._only or ()), ("skip", self._skip)):
            for name in names:
                if name not in self._seen:
                    close = difflib.get_close_matches(name, sorted(self._seen), n=3)
                    hint = f"; similar: {some(map(repr, close))}" if close else ""
                    raise ValueError(f"{argument} must name parts of the training state, {name!r} is none{hint}")

    def _match(self, live: Any, saved: Any, place: Place) -> Any:
        if isinstance(live, PerRank):
            live = live.value
        saved = self._of_this_rank(saved, place)
        kind = kind_of(live)
        if kind is not None:
            if self.selected(place):
                self._leaf(kind, live, saved, place)
            elif saved is not _ABSENT:
                self.notes.append(f"{place.path}: skipped")
            return live
        items = items_of(live)
        has_leaves = next(leaves_in(live), None) is not None
        if items is not None and saved is not _ABSENT_RANK and (has_leaves or _has_leaf(saved)):
            tag = next(iter(saved)) if isinstance(saved, dict) and saved else ""
            if tag in (("dict", "pairs") if isinstance(live, Mapping) else ("list", "tuple")):
                return self._container(live, items, saved, place)
            if saved is not _ABSENT and (has_leaves or tag in _CONTAINERS):
                self._other_container(live, saved, place)
                return live
            if has_leaves:  # each of them is missing
                for key, item in items:
                    self.match(item, _ABSENT, place.at(key))
                return live
        return self._plain(live, saved, place)

    def _other_container(self, live: Any, saved: Any, place: Place) -> None:
        """Notes that ``live`` cannot continue what is no container of its kind, unless nothing in it is selected."""
        inside = [self.selected(leaf) for leaf, _ in leaves_in(live, place)]
        if any(inside) or self.selected(place):
            kind = "dict" if isinstance(live, Mapping) else type(live).__name__
            self.differences.append(f"{place.path}: the checkpoint has {in_words(saved)}, here is {an(kind)}")

    def _of_this_rank(self, saved: Any, place: Place) -> Any:
        if not (isinstance(saved, dict) and saved.keys() == {"per_rank"}):
            return saved
        if self._rank_leaves is None:
            if self.selected(place):
                self.notes.append(
                    f"{place.path}: it belongs to a rank and is not filled, since the number of ranks is another one"
                )
            return _ABSENT_RANK
        key = saved["per_rank"]
        if type(key) is not str or key not in self._rank_leaves:
            self._reader.corrupt(place.path, "the key of a leaf of this rank was", key)
        return self._rank_leaves[key]

    def _leaf(self, kind: str, live: Any, saved: Any, place: Place) -> None:
        if saved is _ABSENT_RANK:
            return
        other_tags = {"optimizer": ("object",), "tensor": (SUBCLASS, BOXES)}.get(kind, ())
        wanted = next((tag for tag in other_tags if isinstance(saved, dict) and tag in saved), kind)
        if saved is _ABSENT or not isinstance(saved, dict) or wanted not in saved:
            found = "nothing" if saved is _ABSENT else in_words(saved)
            self.missing.append(f"{place.path}: the checkpoint has {found} for {an(class_name(live))}")
            return
        self.leaves.plan(wanted, live, saved[wanted], place)

    def _plain(self, live: Any, saved: Any, place: Place) -> Any:
        if saved is _ABSENT_RANK or not self.selected(place):
            return live
        if saved is _ABSENT:
            self.missing.append(f"{place.path}: it was not saved")
            return live
        if _has_leaf(saved):
            self.unexpected.append(f"{place.path}: the checkpoint has {in_words(saved)}, here is {an(type(live).__name__)}")
            return live
        self._reader.begin_leaf()
        return self._reader.value(saved, place.path)

    def _container(self, live: Any, items: list[tuple[Any, Any]], saved: dict[str, Any], place: Place) -> Any:
        tag, content = next(iter(saved.items()))
        of_saved: dict[Any, Any]
        if tag == "dict" and type(content) is dict:
            of_saved = content
        elif tag == "pairs":
            of_saved = dict(self._reader.pairs(content, place.path))
        elif tag in ("list", "tuple") and type(content) is list:
            of_saved = dict(enumerate(content))
        else:
            self._reader.corrupt(place.path, f"a value of the kind {tag!r} was", content)
        values = {key: self.match(item, of_saved.get(key, _ABSENT), place.at(key)) for key, item in items}
        for key, item in of_saved.items():
            if key not in values:
                self._only_saved(key, item, place.at(key), values)
        if isinstance(live, Mapping):
            return values
        return type(live)(values[key] for key in sorted(values))

    def _only_saved(self, key: Any, saved: Any, place: Place, values: dict[Any, Any]) -> None:
        """Plain data that only the checkpoint has is returned; leaves are unexpected."""
        if not self.selected(place):
            return
        if _has_leaf(saved):
            self.unexpected.append(f"{place.path}: the checkpoint has {in_words(saved)}, here is nothing")
        else:
            self._reader.begin_leaf()
            values[key] = self._reader.value(saved, place.path)


#: Instead of the state of a leaf of a rank, if the number of ranks has changed: the leaf keeps its state, which is no error.
_ABSENT_RANK: Any = object()


def _has_leaf(saved: Any) -> bool:
    """Whether a leaf is anywhere in ``saved``, a value of the document."""
    waiting = [saved]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, dict) or not value:
            continue
        tag, content = next(iter(value.items()))
        if tag in _LEAVES:
            return True
        if tag == "dict" and isinstance(content, dict):
            waiting += content.values()
        elif tag in ("list", "tuple") and isinstance(content, list):
            waiting += content
        elif tag == "pairs" and isinstance(content, list):
            waiting += [pair[-1] for pair in content if isinstance(pair, list) and pair]
    return False


def in_words(saved: Any) -> str:
    """What ``saved`` is: the class of an object, or the kind of a value."""
    if not isinstance(saved, dict) or not saved:
        return an(type(saved).__name__) if saved is not None else "None"
    tag, content = next(iter(saved.items()))
    if tag in ("optimizer", "module", "object", "generator") and isinstance(content, dict):
        return an(str(content.get("class"))[:80])
    if tag in _CONTAINERS:
        names = f" of {some(map(glimpse, content))}" if tag == "dict" and isinstance(content, dict) and content else ""
        return f"{_CONTAINERS[tag]}{names}"
    if tag in ("tensor", "array"):
        return an(tag)
    if tag == BOXES:
        return "a distributed tensor"
    return f"a value of the kind {str(tag)[:20]!r}"
