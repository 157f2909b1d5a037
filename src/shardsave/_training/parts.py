"""Finds a part of a stored training state that can fill a model: the state of a module, such as an averaged one, or a dict of tensors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

from shardsave._common.words import some
from shardsave._training.match import in_words
from shardsave._training.read_values import ValueReader
from shardsave._training.restore import StoredTraining
from shardsave._training.write_values import MAX_DEPTH
from shardsave.errors import IncompatibleCheckpointError

#: What `AveragedModel` calls the model in it, and how often it was updated.
_AVERAGED, _COUNTER = "module.", "n_averaged"


class StatePart(NamedTuple):
    """``tensors``: name in the model → stored name. ``others``: name → extra state that is plain data."""

    tensors: Mapping[str, str]
    others: Mapping[str, Any]


def find_part(stored: StoredTraining, part: str, prefix: str = "") -> StatePart:
    """The part at the place ``part``, written as for ``skip=``: its names that begin with ``prefix``, without it.

    Raises IncompatibleCheckpointError if nothing there can fill a model, CorruptCheckpointError for a document that is none.
    """
    values: dict[str, Any] = {}
    for name, value in _values(stored.shared, "", stored.leaves if stored.ranks == 1 else {}, 0):
        values.setdefault(name, value)
    value = values.get(part)
    if value is None or not _can_fill(value):
        _refuse(stored.where, part, values)
    found = _state_of(value, ValueReader(stored.tensors, stored.where), f"training, part {part!r}")
    names = {*found.tensors, *found.others}
    if _COUNTER in names and len(names) > 1 and all(name.startswith(_AVERAGED) for name in names - {_COUNTER}):
        found = _below(found, _AVERAGED)
    if prefix and not (below := _below(found, prefix)).tensors:
        raise IncompatibleCheckpointError(
            f"cannot load from {stored.where}: names that begin with {prefix!r} were asked for, part {part!r} has "
            f"{some(map(repr, found.tensors))}; the module is unchanged"
        )
    return below if prefix else found


def _values(value: Any, name: str, leaves: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    """Every value in ``value`` with the name of its place."""
    if not isinstance(value, dict) or not value or depth > MAX_DEPTH:
        yield name, value
        return
    tag, content = next(iter(value.items()))
    if tag == "per_rank":
        yield from _values(leaves.get(content) if isinstance(content, str) else None, name, leaves, depth + 1)
        return
    yield name, value
    items: list[tuple[Any, Any]] = []
    if tag == "dict" and isinstance(content, dict):
        items = [*content.items()]
    elif tag in ("list", "tuple") and isinstance(content, list):
        items = [*enumerate(content)]
    elif tag == "pairs" and isinstance(content, list):
        items = [(pair[0], pair[1]) for pair in content if isinstance(pair, list) and len(pair) == 2]
    for key, item in items:
        if not isinstance(key, (dict, list)):
            yield from _values(item, f"{name}/{key}" if name else str(key), leaves, depth + 1)


def _can_fill(value: Any) -> bool:
    """Whether ``value`` is the state of a module or a dict of tensors."""
    if not isinstance(value, dict) or not value:
        return False
    tag, content = next(iter(value.items()))
    if tag == "module":
        return True
    tensors = content.values() if tag == "dict" and isinstance(content, dict) else ()
    return bool(tensors) and all(isinstance(tensor, dict) and "tensor" in tensor for tensor in tensors)


def _state_of(value: dict[str, Any], reader: ValueReader, path: str) -> StatePart:
    if "dict" in value:
        tensors, others = {name: tensor["tensor"] for name, tensor in value["dict"].items()}, {}
    else:
        _, tensors, others = reader.members(value["module"], path, {"class": str, "tensors": dict, "others": dict})
    for name, stored_name in tensors.items():
        reader.stored(stored_name, f"{path}, {name}")
    states = {name: reader.value(other, f"{path}[{name!r}]") for name, other in others.items()}
    # Extra state with tensors in it would need more than names: to a strict load it is missing.
    return StatePart(tensors, states if not reader.targets else {})


def _below(found: StatePart, prefix: str) -> StatePart:
    """What ``found`` has below ``prefix``, without it."""
    tensors, others = (
        {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)} for values in found
    )
    return StatePart(tensors, others)


def _refuse(where: str, part: str, values: Mapping[str, Any]) -> NoReturn:
    able = [name for name, value in values.items() if name and _can_fill(value)]
    there = f"it has {in_words(values[part])}" if part in values else "it has none of that name"
    close = difflib.get_close_matches(part, able, n=1) if part not in values else []
    listed = f"parts that can fill a model: {some(map(repr, able), 10)}" if able else "no part of it can fill a model"
    raise IncompatibleCheckpointError(
        f"cannot load from {where}: the state of a module or a dict of tensors was expected at {part!r} of the training state, {there}"
        f"{f' (the closest is {close[0]!r})' if close else ''}; {listed}; the module is unchanged"
    )
