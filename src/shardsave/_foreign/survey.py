"""Visits every container of a file: which have tensors, which are training state, whole modules, or not wanted by the caller."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn, Protocol

from shardsave._foreign.containers import (
    Attributed,
    children,
    counts_as_tensor,
    is_container,
    is_tensor,
    is_tensor_list,
    tensors_in,
    without_attributes,
)
from shardsave._foreign.records import Record
from shardsave._foreign.training_state import are_random_states, is_training_state
from shardsave.errors import IncompatibleCheckpointError

#: The keys that lead to a value.
Keys = tuple[str, ...]

#: How many keys may lead to a value, and how often containers are visited again because they are in several others.
_MAX_DEPTH, _MAX_REPEATED = 100, 10_000


class Wanted(Protocol):
    """Whether a value of this name, or at this path, is to be converted."""

    def __call__(self, name: str, *, exact: bool = True) -> bool:
        """``exact``: whether a pattern that is exactly ``name`` counts, and not only patterns that match more than it."""


class Node(NamedTuple):
    """A container without what was dropped. ``tensors``: its own, those of a list ``x`` as ``x.0``, ``x.1``; ``others``: the rest."""

    keys: Keys
    tensors: dict[str, Any]
    others: dict[str, Any]

    def counted(self) -> dict[str, Any]:
        """Its own tensors, and what else counts as one."""
        return {**self.tensors, **{name: value for name, value in self.others.items() if counts_as_tensor(value)}}


class Survey:
    """Visits every container of a file. ``training``: the paths of training state, which is not visited if ``recognize``.

    ``nodes``: the visited containers, in file order. ``lists``: those that are lists of tensors, which count as a part of the
    container that they are in. ``dropped``: the paths that are not wanted. ``modules``: objects that were modules, which are not visited.
    ``attributes``: those of tensors, by their paths; they are no tensors and are left out.
    """

    def __init__(self, content: Any, wanted: Wanted, path: str, *, recognize: bool) -> None:
        self.nodes: list[Node] = []
        self.lists: list[Node] = []
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
    def root(self) -> Node:
        return self.nodes[0] if self.nodes else Node((), {}, {})

    def is_random_state(self, node: Node) -> bool:
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
            refuse(self._path, "it has containers that are nested too deeply, or in themselves")
        node = Node(keys, {}, {})
        self.nodes.append(node)
        for name, child in children(value):
            if is_tensor_list(child) and not self._drops(keys, name):
                items = dict(children(child))
                self.lists.append(Node((*keys, name), {n: without_attributes(item) for n, item in items.items()}, {}))
                for number, item in items.items():
                    self._sort_in(node, f"{name}.{number}", item)
            else:
                self._sort_in(node, name, child)

    def _sort_in(self, node: Node, name: str, value: Any) -> None:
        if self._drops(node.keys, name):
            return
        if name in node.tensors or name in node.others:
            refuse(self._path, f"{'.'.join((*node.keys, name))!r} is there twice")
        if isinstance(value, Attributed) and not value.is_subclass:
            self._sort_attributes(node, name, value)
            value = value.tensor
        if is_tensor(value):
            node.tensors[name] = value
        else:
            node.others[name] = value
            self.visit((*node.keys, name), value)

    def _sort_attributes(self, node: Node, tensor: str, value: Attributed) -> None:
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


def refuse(path: str, found: str) -> NoReturn:
    """Raises the error for a file at ``path`` that is ``found`` not to be one state dict."""
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: one mapping of names to tensors was expected, {found}; nothing was written"
    )
