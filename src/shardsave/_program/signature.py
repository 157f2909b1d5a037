"""The arguments that a program takes, and how the arguments of a call become the inputs of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Union

import torch

from shardsave._common.strict_json import glimpse
from shardsave._printable import printable
from shardsave._program.graph import DTYPES, FLOATS, MAX_DEPTH
from shardsave._program.refusals import BadProgram


class _Size(NamedTuple):
    """A size that may differ from call to call. In one call, all sizes with the same name are equal."""

    name: str
    least: int
    most: int | None

    def __str__(self) -> str:
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


class _Tensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[Union[int, _Size], ...]


class _Constant(NamedTuple):
    value: Any


_Tree = Union[_Tensor, _Size, _Constant, list["_Tree"], dict[str, "_Tree"]]


class Signature:
    """The ``arguments`` of a document. ``inputs``: the number of their leaves; each leaf is an input of the graph. Raises BadProgram."""

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict) or document.keys() != {"positional", "keyword"}:
            raise BadProgram("arguments", "positional and keyword", document)
        positional, keyword = document["positional"], document["keyword"]
        if not isinstance(positional, list) or not isinstance(keyword, dict):
            raise BadProgram("arguments", "a list for positional and an object for keyword", document)
        self.inputs = 0
        self._positional = []
        for pair in positional:
            if not isinstance(pair, list) or len(pair) != 2 or not (pair[0] is None or isinstance(pair[0], str)):
                raise BadProgram("arguments", "a pair of a name or null and a tree", pair)
            self._positional.append((pair[0], self._read_tree(pair[1], 0)))
        self._keyword = {name: self._read_tree(tree, 0) for name, tree in keyword.items()}

    def _read_tree(self, tree: Any, depth: int) -> _Tree:
        if isinstance(tree, dict) and depth <= MAX_DEPTH:
            keys = tree.keys()
            if keys == {"list"} and isinstance(tree["list"], list):
                return [self._read_tree(part, depth + 1) for part in tree["list"]]
            if keys == {"dict"} and isinstance(tree["dict"], dict):
                return {name: self._read_tree(part, depth + 1) for name, part in tree["dict"].items()}
            self.inputs += 1
            if keys == {"tensor", "shape"} and isinstance(tree["tensor"], str) and isinstance(tree["shape"], list):
                if tree["tensor"] not in DTYPES:
                    raise BadProgram("arguments", f"a dtype of torch {torch.__version__}", tree["tensor"])
                return _Tensor(DTYPES[tree["tensor"]], tuple(map(_read_size, tree["shape"])))
            if keys == {"size", "min", "max"}:
                return _read_size(tree)  # type: ignore[return-value]
            if keys == {"constant"}:
                value = tree["constant"]
                if value is None or isinstance(value, (bool, int, float, str)):
                    return _Constant(value)
                if (
                    isinstance(value, dict)
                    and value.keys() == {"float"}
                    and isinstance(value["float"], str)
                    and value["float"] in FLOATS
                ):
                    return _Constant(FLOATS[value["float"]])
        raise BadProgram("arguments", "a tensor, a size, a constant, or a list or dict of them", tree)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Returns the leaves of a call's arguments, in order. Raises TypeError, ValueError."""
        if len(args) > len(self._positional):
            raise TypeError(f"at most {len(self._positional)} positional arguments were expected, {len(args)} were given")
        unused: dict[str, Any] = dict(kwargs)
        leaves: list[Any] = []
        sizes: dict[str, tuple[int, str]] = {}
        for place, (name, tree) in enumerate(self._positional):
            where = f"argument {printable(name or str(place))}"
            value = args[place] if place < len(args) else _take_by_name(unused, name, tree, where)
            _add_leaves(tree, value, where, sizes, leaves)
        for name, tree in self._keyword.items():
            where = f"argument {printable(name)}"
            _add_leaves(tree, _take_by_name(unused, name, tree, where), where, sizes, leaves)
        if unused:
            raise TypeError(f"argument {printable(next(iter(unused)))} was not expected: the program was exported without it")
        return leaves


def _read_size(size: Any) -> Union[int, _Size]:
    if type(size) is int and size >= 0:
        return size
    if isinstance(size, dict) and size.keys() == {"size", "min", "max"} and isinstance(size["size"], str):
        least, most = size["min"], size["max"]
        if type(least) is int and (most is None or type(most) is int):
            return _Size(size["size"], least, most)
    raise BadProgram("arguments", "a size", size)


def _take_by_name(unused: dict[str, Any], name: str | None, tree: _Tree, where: str) -> Any:
    """Removes the argument ``name`` from ``unused`` and returns it. A constant may be left out of a call."""
    if name is not None and name in unused:
        return unused.pop(name)
    if isinstance(tree, _Constant):
        return tree.value
    raise TypeError(f"{where} was expected, it was not given")


def _add_leaves(tree: _Tree, value: Any, where: str, sizes: dict[str, tuple[int, str]], leaves: list[Any]) -> None:
    """Checks ``value`` against ``tree``, and adds its leaves to ``leaves``.

    ``sizes``: the name of each size that was met so far → the size, and where it was met first.
    """
    if isinstance(tree, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(tree):
            raise TypeError(f"{where}: a list or tuple of {len(tree)} was expected, {_describe(value)} was given")
        for place, (part, inner) in enumerate(zip(tree, value)):
            _add_leaves(part, inner, f"{where}[{place}]", sizes, leaves)
    elif isinstance(tree, dict):
        if not isinstance(value, Mapping) or value.keys() != tree.keys():
            names = printable(", ".join(tree)) or "nothing"
            raise TypeError(f"{where}: a dict with {names} was expected, {_describe(value)} was given")
        for name, part in tree.items():
            _add_leaves(part, value[name], f"{where}[{name!r}]", sizes, leaves)
    else:
        _check_leaf(tree, value, where, sizes)
        leaves.append(value)


def _check_leaf(leaf: Union[_Tensor, _Size, _Constant], value: Any, where: str, sizes: dict[str, tuple[int, str]]) -> None:
    if isinstance(leaf, _Tensor):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{where}: a tensor was expected, {_describe(value)} was given")
        if value.dtype != leaf.dtype or value.dim() != len(leaf.shape):
            raise TypeError(f"{where}: {leaf.dtype} of {len(leaf.shape)} dimensions was expected, {_describe(value)} was given")
        for place, (expected, size) in enumerate(zip(leaf.shape, value.shape)):
            _check_size(expected, size, f"{where}: size of dimension {place}", sizes)
    elif isinstance(leaf, _Size):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{where}: an int was expected, {_describe(value)} was given")
        _check_size(leaf, value, where, sizes)
    elif not _is_same(value, leaf.value):
        raise ValueError(
            f"{where}: {glimpse(leaf.value)} was expected, as the program was exported, {glimpse(value)} was given"
        )


def _check_size(expected: Union[int, _Size], size: Any, where: str, sizes: dict[str, tuple[int, str]]) -> None:
    if isinstance(expected, int):
        if size != expected:
            raise ValueError(f"{where}: {expected} was expected, as the program was exported, {size} was given")
        return
    if size < expected.least or (expected.most is not None and size > expected.most):
        raise ValueError(f"{where}: {expected} was expected, {size} was given")
    first, first_where = sizes.setdefault(expected.name, (size, where))
    if first != size:
        raise ValueError(f"{where}: {first} was expected, as in {first_where.removeprefix('argument ')}, {size} was given")


def _is_same(value: Any, constant: Any) -> bool:
    # NaN counts as equal to itself.
    return type(value) is type(constant) and (value == constant or (value != value and constant != constant))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of {value.dim()} dimensions"
    if isinstance(value, Mapping):
        return f"a dict with {printable(', '.join(map(str, value))) or 'nothing'}"
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
