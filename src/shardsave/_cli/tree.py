"""The modules of a checkpoint as a tree; each module has the sums over all tensors below it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from shardsave._storage.checkpoint import Checkpoint, Located


@dataclass
class Sums:
    """Sums over some tensors. ``parameter_bytes`` is None if none of them is a parameter, or if that is unknown."""

    tensors: int = 0
    bytes: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    parameter_bytes: int | None = None
    frozen_bytes: int = 0
    tied: int = 0  # names whose bytes are counted under another name

    def add(self, tensor: Located, frozen: bool | None) -> None:
        """Adds a tensor; ``frozen`` is None if it is not a parameter."""
        self.tensors += 1
        self.bytes += tensor.nbytes
        self.dtypes[tensor.dtype] += tensor.nbytes
        if frozen is not None:
            self.parameter_bytes = (self.parameter_bytes or 0) + tensor.nbytes
            self.frozen_bytes += tensor.nbytes if frozen else 0

    def join(self, other: Sums) -> None:
        """Adds all tensors of ``other``."""
        self.tensors += other.tensors
        self.bytes += other.bytes
        self.dtypes += other.dtypes
        self.frozen_bytes += other.frozen_bytes
        self.tied += other.tied
        if other.parameter_bytes is not None:
            self.parameter_bytes = (self.parameter_bytes or 0) + other.parameter_bytes

    @property
    def frozen_share(self) -> float | None:
        """The frozen share of the parameters' bytes; None if there are none, or if that is unknown."""
        return self.frozen_bytes / self.parameter_bytes if self.parameter_bytes else None


@dataclass
class Module:
    """A node of the tree, with the sums of all tensors below it."""

    sums: Sums = field(default_factory=Sums)
    children: dict[str, Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the printed tree. ``last``: for each level, whether the branch is the last one of that level."""

    name: str
    last: tuple[bool, ...]
    sums: Sums


def module_tree(checkpoint: Checkpoint, depth: int) -> Module:
    """The tree down to ``depth`` levels; deeper tensors are added to the module above them."""
    flags = checkpoint.stored_flags or {}
    root = Module()
    nodes: dict[str, Module] = {}

    def owner(name: str) -> Module:
        prefix = name.rpartition(".")[0]
        if prefix not in nodes:
            node = root
            for part in prefix.split(".")[:depth] if prefix else ():
                node = node.children.setdefault(part, Module())
            nodes[prefix] = node
        return nodes[prefix]

    for name in checkpoint.stored_names:  # in the order of the state, if that is known
        owner(name).sums.add(checkpoint.tensors[name], flags.get(name))
    for name in checkpoint.ties:
        owner(name).sums.tied += 1
    _sum_up(root)
    return root


def _sum_up(module: Module) -> None:
    for child in module.children.values():
        _sum_up(child)
        module.sums.join(child.sums)


def rows(module: Module, most: int | None, last: tuple[bool, ...] = ()) -> Iterator[Row]:
    """The lines below ``module``. If it has more than ``most`` + 1 children, those after the first ``most`` share one line of sums."""
    children = list(module.children.items())
    rest = children[most:] if most is not None and len(children) > most + 1 else []
    shown = children[: len(children) - len(rest)]
    for place, (name, child) in enumerate(shown):
        child_last = (*last, place == len(shown) - 1 and not rest)
        yield Row(name, child_last, child.sums)
        yield from rows(child, most, child_last)
    if rest:
        joined = Sums()
        for _, child in rest:
            joined.join(child.sums)
        yield Row(f"… {len(rest):,} more", (*last, True), joined)


def guides(row: Row, terminal: bool) -> str:
    """The lines or spaces before a row's name that show its place in the tree."""
    if not terminal:
        return "  " * (len(row.last) - 1)
    above = "".join("    " if last else "│   " for last in row.last[:-1])
    return above + ("└── " if row.last[-1] else "├── ")
