"""Chooses the state dict in a file that may hold more: optimizer state, counters, several states under different keys.

Nothing that has tensors is left out without being named. Training state is left out with a note, what the caller drops is left out, and
everything else has to be one mapping of names to tensors; otherwise an error lists what there is.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, NoReturn, Protocol

from shardsave._common.words import an, some
from shardsave._foreign.containers import (
    Attributed,
    bytes_of,
    children,
    count_tensors,
    counts_as_tensor,
    describe,
    is_container,
    is_tensor,
    is_tensor_list,
    kind_of,
    tensors_in,
    without_attributes,
)
from shardsave._foreign.pickle_refusals import MODULE_ADVICE
from shardsave._foreign.training_state import are_random_states, is_training_state
from shardsave._foreign.unpickling import Record
from shardsave.errors import IncompatibleCheckpointError

#: How many keys may lead to a value, and how often containers are visited again because they are in several others.
_MAX_DEPTH, _MAX_REPEATED = 100, 10_000

#: How many items a message lists: of values without tensors, and of those with tensors.
_LISTED, _LISTED_WITH_TENSORS = 5, 20


class Wanted(Protocol):
    """Whether a value of this name, or at this path, is to be converted."""

    def __call__(self, name: str, *, exact: bool = True) -> bool:
        """``exact``: whether a pattern that is exactly ``name`` counts, and not only patterns that match more than it."""


#: The keys that lead to a value.
Keys = tuple[str, ...]


class Choice(NamedTuple):
    """The chosen state, name → tensor; the paths that were dropped by request; and notes of everything else that is left out."""

    state: dict[str, Any]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


class _Node(NamedTuple):
    """A container without what was dropped. ``tensors``: its own, those of a list ``x`` as ``x.0``, ``x.1``; ``others``: the rest."""

    keys: Keys
    tensors: dict[str, Any]
    others: dict[str, Any]

    def counted(self) -> dict[str, Any]:
        """Its own tensors, and what else counts as one."""
        return {**self.tensors, **{name: value for name, value in self.others.items() if counts_as_tensor(value)}}


def choose_state(content: Any, key: str | None, wanted: Wanted, path: str) -> Choice:
    """Chooses the state in ``content``: the container at ``key``; without a key, the only one with tensors that are no training state.

    ``path`` is for messages. Raises IncompatibleCheckpointError, with a list of what the file holds, unless exactly one is meant and
    everything in it is a tensor, is training state or is dropped.
    """
    survey = _Survey(content, wanted, path, recognize=key is None)
    survey.visit((), content)
    _refuse_modules(survey, key, path)
    states = [node for node in survey.nodes if node.counted() and not survey.is_random_state(node)]
    if key is None:
        if len(states) > 1:
            _refuse(path, f"it has {_list_states(states)}; {_advice(states)}")
        node = states[0] if states else _Node((), {}, survey.root.others)
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
        _refuse(path, _describe(content, node, others, survey))
    dropped = tuple(map(".".join, survey.dropped))
    return Choice(node.tensors, dropped, _left_out(content, node, survey))


def _refuse_modules(survey: _Survey, key: str | None, path: str) -> None:
    """Refuses a file with a whole module where the state is wanted: its weights are in many containers, and none of them is its state."""
    wanted = [keys for keys in survey.modules if key is None or not keys or f"{key}.".startswith(f"{'.'.join(keys)}.")]
    if wanted:
        inner = ".".join(wanted[0])
        where = f", or leave it out with drop={inner!r}" if inner and len(survey.nodes) > 1 else ""
        values = _list_values({".".join(keys): survey.modules[keys] for keys in wanted})
        found = f"it has a whole module: {values}" if inner else f"it is a whole module ({describe(survey.modules[()])})"
        _refuse(path, f"{found}; {MODULE_ADVICE}{where}")


def refuse_key(path: str, key: str, found: str) -> NoReturn:
    """Raises the error for a ``key`` that leads to no mapping in the file at ``path``."""
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a mapping at key {key!r} was expected, there is {found}; nothing was written"
    )


def _refuse(path: str, found: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: one mapping of names to tensors was expected, {found}; nothing was written"
    )


class _Survey:
    """Visits every container of a file. ``training``: the paths of training state, which is not visited if ``recognize``.

    ``nodes``: the visited containers, in file order. ``lists``: those that are lists of tensors, which count as a part of the
    container that they are in. ``dropped``: the paths that are not wanted. ``modules``: objects that were modules, which are not visited.
    ``attributes``: those of tensors, by their paths; they are no tensors and are left out.
    """

    def __init__(self, content: Any, wanted: Wanted, path: str, *, recognize: bool) -> None:
        self.nodes: list[_Node] = []
        self.lists: list[_Node] = []
        self.training: dict[Keys, Any] = {}
        self.dropped: dict[Keys, None] = {}
        self.modules: dict[Keys, Any] = {}
        self.attributes: dict[Keys, Any] = {}
        self._content = content
        self._wanted = wanted
        self._path = path
        self._recognize = recognize
        self._visited: set[int] = set()

    @property
    def root(self) -> _Node:
        return self.nodes[0] if self.nodes else _Node((), {}, {})

    def is_random_state(self, node: _Node) -> bool:
        """Whether ``node`` has no tensors but states of random number generators; notes them as training state."""
        if not self._recognize or len(node.counted()) > len(node.tensors) or not are_random_states(node.tensors):
            return False
        self.training.update(((*node.keys, name), tensor) for name, tensor in node.tensors.items())
        return True

    def visit(self, keys: Keys, value: Any) -> None:
        if not is_container(value) or isinstance(value, Attributed):
            return
        if isinstance(value, Record) and value.is_module:
            self.modules[keys] = value
            return
        if self._recognize and is_training_state(keys[-1] if keys else "", value):
            self.training[keys] = value
            return
        self._visited.add(id(value))
        if len(keys) > _MAX_DEPTH or len(self.nodes) > len(self._visited) + _MAX_REPEATED:
            _refuse(self._path, "it has containers that are nested too deeply, or in themselves")
        node = _Node(keys, {}, {})
        self.nodes.append(node)
        for name, child in children(value):
            if is_tensor_list(child) and not self._drops(keys, name):
                items = dict(children(child))
                self.lists.append(_Node((*keys, name), {n: without_attributes(item) for n, item in items.items()}, {}))
                for number, item in items.items():
                    self._sort_in(node, f"{name}.{number}", item)
            else:
                self._sort_in(node, name, child)

    def _sort_in(self, node: _Node, name: str, value: Any) -> None:
        if self._drops(node.keys, name):
            return
        if name in node.tensors or name in node.others:
            _refuse(self._path, f"{'.'.join((*node.keys, name))!r} is there twice")
        if isinstance(value, Attributed) and not value.is_subclass:
            self._sort_attributes(node, name, value)
            value = value.tensor
        if is_tensor(value):
            node.tensors[name] = value
        else:
            node.others[name] = value
            self.visit((*node.keys, name), value)

    def _sort_attributes(self, node: _Node, tensor: str, value: Attributed) -> None:
        """Attributes of a tensor are no part of a state: those that have tensors have to be dropped, the others are noted."""
        for attribute, content in value.attributes.items():
            name = f"{tensor}.{attribute}"
            path = (*node.keys, name)
            if not any(True for _ in tensors_in(content)):
                self.attributes[path] = content
            elif not self._drops(node.keys, name):
                node.others[name] = content

    def _drops(self, keys: Keys, name: str) -> bool:
        """Whether the value ``name`` in the container at ``keys`` is not wanted, by its path or by its name.

        What is exactly the path of another value in the file means that value alone: ``ema`` beside the weights, and no weight ``ema``.
        """
        path = (*keys, name)
        if self._wanted(".".join(path)):
            if not keys or self._wanted(name):
                return False
            if self._wanted(name, exact=False) and _has_path(self._content, name):
                return False
        self.dropped[path] = None
        return True


def _has_path(value: Any, path: str) -> bool:
    """Whether there is something at ``path``, keys joined by dots, in ``value``."""
    return any(
        path == key or (path.startswith(f"{key}.") and _has_path(child, path[len(key) + 1 :])) for key, child in children(value)
    )


def _list_states(states: list[_Node]) -> str:
    """Lists ``states``, the largest first, each with its number of tensors and their bytes."""
    in_order = sorted(states, key=_size, reverse=True)
    return some((f"{_label(node)} ({count_tensors(node.counted().values())})" for node in in_order), _LISTED)


def _size(node: _Node) -> int:
    return sum(map(bytes_of, node.counted().values()))


def _label(node: _Node) -> str:
    return repr(".".join(node.keys)) if node.keys else f"at its top {some(map(repr, node.counted()))}"


def _advice(states: list[_Node]) -> str:
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


def _describe(content: Any, node: _Node, others: dict[str, Any], survey: _Survey) -> str:
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


def _left_out(content: Any, node: _Node, survey: _Survey) -> tuple[str, ...]:
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
