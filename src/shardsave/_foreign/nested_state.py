"""Chooses the state dict in a file that may hold more: optimizer state, counters, several states under different keys.

Nothing that has tensors is left out without being named. Training state is left out with a note, what the caller drops is left out, and
everything else has to be one mapping of names to tensors; otherwise an error lists what there is.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, NoReturn

from shardsave._common.words import an, some
from shardsave._foreign.containers import (
    Attributed,
    bytes_of,
    children,
    count_tensors,
    describe,
    is_container,
    is_tensor,
    kind_of,
    tensors_in,
    without_attributes,
)
from shardsave._foreign.pickle_refusals import MODULE_ADVICE
from shardsave._foreign.survey import Keys, Node, Survey, Wanted, refuse
from shardsave.errors import IncompatibleCheckpointError

#: How many items a message lists: of values without tensors, and of those with tensors.
_LISTED, _LISTED_WITH_TENSORS = 5, 20


class Choice(NamedTuple):
    """The chosen state, name → tensor; the paths that were dropped by request; and notes of everything else that is left out."""

    state: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def choose_state(content: Any, key: str | None, wanted: Wanted, path: str) -> Choice:
    """Chooses the state in ``content``: the container at ``key``; without a key, the only one with tensors that are no training state.

    ``path`` is for messages. Raises IncompatibleCheckpointError, with a list of what the file holds, unless exactly one is meant and
    everything in it is a tensor, is training state or is dropped.
    """
    survey = Survey(content, wanted, path, recognize=key is None)
    survey.visit((), content)
    _refuse_modules(survey, key, path)
    states = [node for node in survey.nodes if node.counted() and not survey.is_random_state(node)]
    if key is None:
        if len(states) > 1:
            refuse(path, f"it has {_list_states(states)}; {_advice(states)}")
        node = states[0] if states else Node((), {}, survey.root.others)
    else:
        at_key = [node for node in (*survey.nodes, *survey.lists) if ".".join(node.keys) == key]
        if not at_key:
            refuse_key(path, key, _list_states(states) or "no mapping of names to tensors")
        if len(at_key) > 1:
            raise IncompatibleCheckpointError(
                f"cannot convert {path}: one mapping at key {key!r} was expected, it leads to several: "
                f"{' and '.join(str([*node.keys]) for node in at_key)}; load the file and save the wanted one alone; nothing was written"
            )
        node = at_key[0]
    others = {name: value for name, value in node.others.items() if (*node.keys, name) not in survey.training}
    if others or not node.tensors:
        refuse(path, _describe(content, node, others, survey))
    dropped = tuple(map(".".join, survey.dropped))
    return Choice(node.tensors, dropped, _left_out(content, node, survey))


def _refuse_modules(survey: Survey, key: str | None, path: str) -> None:
    """Refuses a file with a whole module where the state is wanted: its weights are in many containers, and none of them is its state."""
    wanted = [keys for keys in survey.modules if key is None or not keys or f"{key}.".startswith(f"{'.'.join(keys)}.")]
    if wanted:
        inner = ".".join(wanted[0])
        where = f", or leave it out with drop={inner!r}" if inner and len(survey.nodes) > 1 else ""
        values = _list_values({".".join(keys): survey.modules[keys] for keys in wanted})
        found = f"it has a whole module: {values}" if inner else f"it is a whole module ({describe(survey.modules[()])})"
        refuse(path, f"{found}; {MODULE_ADVICE}{where}")


def refuse_key(path: str, key: str, found: str) -> NoReturn:
    """Raises the error for a ``key`` that leads to no mapping in the file at ``path``."""
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a mapping at key {key!r} was expected, there is {found}; nothing was written"
    )


def _list_states(states: list[Node]) -> str:
    """Lists ``states``, the largest first, each with its number of tensors and their bytes."""
    in_order = sorted(states, key=_size, reverse=True)
    return some((f"{_label(node)} ({count_tensors(node.counted().values())})" for node in in_order), _LISTED)


def _size(node: Node) -> int:
    return sum(map(bytes_of, node.counted().values()))


def _label(node: Node) -> str:
    return repr(".".join(node.keys)) if node.keys else f"at its top {some(map(repr, node.counted()))}"


def _advice(states: list[Node]) -> str:
    """How to say which of ``states`` is meant. One that contains others can only be chosen by dropping these."""
    largest, *smaller = sorted(states, key=_size, reverse=True)
    small = smaller[-1]
    if not small.keys and len(small.counted()) == 1:  # one tensor beside a mapping, such as a counter
        inner = next(iter(small.counted()))
    else:
        inner = ".".join(next(node.keys for node in [*smaller, largest] if node.keys))
    if any(node.keys[: len(largest.keys)] == largest.keys for node in smaller):
        return f"leave out what is not wanted with drop={inner!r}, or choose one with key={inner!r}"
    return f"choose one with key={'.'.join(largest.keys)!r}, or leave out what is not wanted with drop={inner!r}"


def _describe(content: Any, node: Node, others: dict[str, Any], survey: Survey) -> str:
    """Describes a container that is no state, for a message."""
    if others:
        below = {(*node.keys, name): value for name, value in others.items()}
        if node.tensors:
            advice = f" among its tensors, which can be left out with drop={'.'.join(next(iter(below)))!r}"
        else:
            advice = _choose_below(below, "one")
        if any(isinstance(value, Attributed) and value.is_subclass for value in others.values()):
            advice += "; to keep a tensor of a class, load the file with torch and save its values as a plain tensor"
        return f"it has {_list_values(others)}{advice}"
    if survey.training:
        if () in survey.training:
            training = describe(content)
        else:
            training = _list_values({".".join(keys): value for keys, value in survey.training.items()})
        return f"it has only training state: {training}{_choose_below(survey.training, 'a mapping in it')}"
    return "none is left" if survey.dropped else f"it has none, it is {an(kind_of(content))}"


def _choose_below(values: dict[Keys, Any], what: str) -> str:
    """Advice to choose the first mapping in ``values`` that has tensors of its own; empty if none has."""
    visited: set[int] = set()
    waiting = deque(values.items())
    while waiting:
        keys, value = waiting.popleft()
        if not is_container(value) or isinstance(value, Attributed) or id(value) in visited:
            continue
        visited.add(id(value))
        if keys and any(is_tensor(without_attributes(child)) for _, child in children(value)):
            return f"; choose {what} with key={'.'.join(keys)!r}"
        waiting += [((*keys, name), child) for name, child in children(value)]
    return ""


def _list_values(values: dict[str, Any]) -> str:
    return some((f"{name!r} ({describe(value)})" for name, value in values.items()), _LISTED)


def _left_out(content: Any, node: Node, survey: Survey) -> tuple[str, ...]:
    """A note of everything that is left out without a request: what lies outside of the state, and the training state in it."""
    outside: dict[Keys, Any] = {}
    for depth, key in enumerate(node.keys):
        named = dict(children(content))
        outside.update(((*node.keys[:depth], name), value) for name, value in named.items() if name != key)
        content = named[key]
    outside.update((keys, value) for keys, value in survey.training.items() if keys[:-1] == node.keys)
    with_tensors: list[str] = []
    without: list[str] = []
    for keys, value in outside.items():
        if keys not in survey.dropped:
            kind = "training state" if keys in survey.training and is_container(value) else None
            listed = with_tensors if any(True for _ in tensors_in(value)) else without
            listed.append(f"{'.'.join(keys)!r} ({describe(value, kind)})")
    inside = [f"{'.'.join(k)!r} ({describe(v)})" for k, v in survey.attributes.items() if k[:-1] == node.keys]
    notes = (f"left out, since an attribute of a tensor: {some(inside, _LISTED)}",) if inside else ()
    if not with_tensors and not without:
        return notes
    where = f"since not in {'.'.join(node.keys)!r}" if node.keys else "since it is training state"
    lists = (some(listed, most) for listed, most in ((with_tensors, _LISTED_WITH_TENSORS), (without, _LISTED)) if listed)
    return (f"left out, {where}: {', '.join(lists)}", *notes)
