"""Chooses the state dict in a file that may hold more: optimizer state, counters, several states under different keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from shardsave._common.assembled import Assembled
from shardsave._common.words import an, count, some
from shardsave.errors import IncompatibleCheckpointError

#: How many keys may lead to a state.
_MAX_DEPTH = 4

#: How many items a message lists.
_LISTED = 5

#: Whether a tensor of this name is to be converted.
Wanted = Callable[[str], bool]

#: The keys that lead to a mapping, and the mapping.
_Place = tuple[tuple[str, ...], dict[Any, Any]]


def choose_state(content: Any, key: str | None, wanted: Wanted, path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the state in ``content``, name → tensor, and a note of what lies outside it.

    The state is the mapping at ``key``; without a key, the outermost mapping that has only tensors among its wanted values. ``path``
    is for messages. Raises IncompatibleCheckpointError, with a list of what the file holds.
    """
    mappings = list(_mappings(content, ()))
    states = [(keys, mapping) for keys, mapping in mappings if _is_state(mapping, wanted)]
    if key is not None:
        place = next(((keys, mapping) for keys, mapping in mappings if ".".join(keys) == key), None)
        if place is None:
            refuse_key(path, key, _list_states(states) or "no mapping of names to tensors")
        keys, mapping = place
        return {str(name): value for name, value in mapping.items() if wanted(str(name))}, _left_out(content, keys)
    depth = min((len(keys) for keys, _ in states), default=0)
    outermost = [(keys, state) for keys, state in states if len(keys) == depth]
    if len(outermost) == 1:
        keys, state = outermost[0]
        return {name: value for name, value in state.items() if wanted(name)}, _left_out(content, keys)
    if not outermost:
        _refuse(path, _describe(content))
    _refuse(path, f"it has {_list_states(outermost)}; choose one with key={'.'.join(outermost[0][0])!r}")


def refuse_key(path: str, key: str, found: str) -> NoReturn:
    """Raises the error for a ``key`` that leads to no mapping in the file at ``path``."""
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a mapping at key {key!r} was expected, there is {found}; nothing was written"
    )


def _refuse(path: str, found: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: one mapping of names to tensors was expected, {found}; nothing was written"
    )


def _mappings(content: Any, keys: tuple[str, ...]) -> Iterator[_Place]:
    """Every mapping in ``content``, with the keys that lead to it."""
    if not isinstance(content, dict) or len(keys) > _MAX_DEPTH:
        return
    yield keys, content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict):
            yield from _mappings(value, (*keys, name))


def _is_state(mapping: dict[Any, Any], wanted: Wanted) -> bool:
    """Whether ``mapping`` has tensors, and its wanted values are tensors only."""
    if not all(isinstance(name, str) for name in mapping):
        return False
    return any(map(_is_tensor, mapping.values())) and all(_is_tensor(value) for name, value in mapping.items() if wanted(name))


def _is_tensor(value: object) -> bool:
    return isinstance(value, (torch.Tensor, Assembled))


def _list_states(states: list[_Place]) -> str:
    return some((f"{'.'.join(keys)!r} ({count(len(state), 'tensor')})" for keys, state in states), _LISTED)


def _describe(content: Any) -> str:
    """Describes the content of a file without a state, for a message."""
    outer = content if isinstance(content, dict) else {}
    not_tensors = {str(name): value for name, value in outer.items() if not _is_tensor(value)}
    if not not_tensors:
        return f"it has none, it is {an(type(content).__name__)}"
    has_tensors = len(not_tensors) < len(outer)
    advice = f" among its tensors, which can be left out with drop={next(iter(not_tensors))!r}" if has_tensors else ""
    return f"it has {some((f'{name!r} ({_kind(value)})' for name, value in not_tensors.items()), _LISTED)}{advice}"


def _kind(value: object) -> str:
    quantized = isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) and part.is_quantized for part in value)
    return f"{type(value).__name__}{' with a quantized tensor' if quantized else ''}"


def _left_out(content: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    """A note of everything in a file outside the state at ``keys``."""
    outside = []
    for depth, key in enumerate(keys):
        outside += [
            f"{'.'.join((*keys[:depth], str(name)))!r} ({type(value).__name__})"
            for name, value in content.items()
            if name != key
        ]
        content = content[key]
    return (f"left out, since not in {'.'.join(keys)!r}: {some(outside, _LISTED)}",) if outside else ()
