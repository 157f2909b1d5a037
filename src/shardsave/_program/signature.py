"""Which arguments a program takes, as data, and how those of a call become the inputs of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Union

import torch

from shardsave._common.strict_json import glimpse
from shardsave._program.graph import DTYPES, FLOATS, MAX_DEPTH, Bad


class _Size(NamedTuple):
    """A size that may differ from call to call: the same for all of one name."""

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
    """What ``positional`` and ``keyword`` say of a call. ``inputs``: how many values it has, one for each leaf. Raises Bad."""

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict) or document.keys() != {"positional", "keyword"}:
            raise Bad("arguments", "positional and keyword", document)
        positional, keyword = document["positional"], document["keyword"]
        if not isinstance(positional, list) or not isinstance(keyword, dict):
            raise Bad("arguments", "a list and names", document)
        self.inputs = 0
        self._positional = []
        for pair in positional:
            if not isinstance(pair, list) or len(pair) != 2 or not (pair[0] is None or isinstance(pair[0], str)):
                raise Bad("arguments", "a name or null, and what it stands for,", pair)
            self._positional.append((pair[0], self._tree(pair[1], 0)))
        self._keyword = {name: self._tree(tree, 0) for name, tree in keyword.items()}

    def _tree(self, tree: Any, depth: int) -> _Tree:
        if isinstance(tree, dict) and depth <= MAX_DEPTH:
            keys = tree.keys()
            if keys == {"list"} and isinstance(tree["list"], list):
                return [self._tree(part, depth + 1) for part in tree["list"]]
            if keys == {"dict"} and isinstance(tree["dict"], dict):
                return {name: self._tree(part, depth + 1) for name, part in tree["dict"].items()}
            self.inputs += 1
            if keys == {"tensor", "shape"} and isinstance(tree["tensor"], str) and isinstance(tree["shape"], list):
                if tree["tensor"] not in DTYPES:
                    raise Bad("arguments", f"a dtype of torch {torch.__version__}", tree["tensor"])
                return _Tensor(DTYPES[tree["tensor"]], tuple(map(_size, tree["shape"])))
            if keys == {"size", "min", "max"}:
                return _size(tree)  # type: ignore[return-value]
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
        raise Bad("arguments", "a tensor, a size, a constant, or a list or dict of them", tree)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call's arguments, in order. Raises TypeError, ValueError."""
        if len(args) > len(self._positional):
            raise TypeError(f"at most {len(self._positional)} positional arguments were expected, {len(args)} were given")
        left: dict[str, Any] = dict(kwargs)
        inputs: list[Any] = []
        sizes: dict[str, tuple[int, str]] = {}
        for place, (name, tree) in enumerate(self._positional):
            shown = f"argument {name or place}"
            value = args[place] if place < len(args) else _given(left, name, tree, shown)
            _take(tree, value, shown, sizes, inputs)
        for name, tree in self._keyword.items():
            _take(tree, _given(left, name, tree, f"argument {name}"), f"argument {name}", sizes, inputs)
        if left:
            raise TypeError(f"argument {next(iter(left))} was not expected: the program was exported without it")
        return inputs


def _size(size: Any) -> Union[int, _Size]:
    if type(size) is int and size >= 0:
        return size
    if isinstance(size, dict) and size.keys() == {"size", "min", "max"} and isinstance(size["size"], str):
        least, most = size["min"], size["max"]
        if type(least) is int and (most is None or type(most) is int):
            return _Size(size["size"], least, most)
    raise Bad("arguments", "a size", size)


def _given(left: dict[str, Any], name: str | None, tree: _Tree, shown: str) -> Any:
    """What is given by name; what the program was exported with where that is a constant."""
    if name is not None and name in left:
        return left.pop(name)
    if isinstance(tree, _Constant):
        return tree.value
    raise TypeError(f"{shown} was expected, it was not given")


def _take(tree: _Tree, value: Any, shown: str, sizes: dict[str, tuple[int, str]], inputs: list[Any]) -> None:
    """Adds the leaves of ``value`` to ``inputs`` where it is what ``tree`` says; ``sizes`` has those met so far, and where."""
    if isinstance(tree, list):
        if not isinstance(value, (list, tuple)) or len(value) != len(tree):
            raise TypeError(f"{shown}: a list or tuple of {len(tree)} was expected, {_kind(value)} was given")
        for place, (part, inner) in enumerate(zip(tree, value)):
            _take(part, inner, f"{shown}[{place}]", sizes, inputs)
    elif isinstance(tree, dict):
        if not isinstance(value, Mapping) or value.keys() != tree.keys():
            raise TypeError(f"{shown}: a dict with {', '.join(tree) or 'nothing'} was expected, {_kind(value)} was given")
        for name, part in tree.items():
            _take(part, value[name], f"{shown}[{name!r}]", sizes, inputs)
    else:
        if isinstance(tree, _Tensor):
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{shown}: a tensor was expected, {_kind(value)} was given")
            if value.dtype != tree.dtype or value.dim() != len(tree.shape):
                raise TypeError(f"{shown}: {tree.dtype} of {len(tree.shape)} dimensions was expected, {_kind(value)} was given")
            for place, (size, found) in enumerate(zip(tree.shape, value.shape)):
                _check_size(size, found, f"{shown}: size of dimension {place}", sizes)
        elif isinstance(tree, _Size):
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise TypeError(f"{shown}: an int was expected, {_kind(value)} was given")
            _check_size(tree, value, shown, sizes)
        elif not _same(value, tree.value):
            raise ValueError(
                f"{shown}: {glimpse(tree.value)} was expected, as the program was exported, {glimpse(value)} was given"
            )
        inputs.append(value)


def _check_size(size: Union[int, _Size], found: Any, shown: str, sizes: dict[str, tuple[int, str]]) -> None:
    if isinstance(size, int):
        if found != size:
            raise ValueError(f"{shown}: {size} was expected, as the program was exported, {found} was given")
        return
    if found < size.least or (size.most is not None and found > size.most):
        raise ValueError(f"{shown}: {size} was expected, {found} was given")
    first, where = sizes.setdefault(size.name, (found, shown))
    if first != found:
        raise ValueError(f"{shown}: {first} was expected, as {where.removeprefix('argument ')}, {found} was given")


def _same(value: Any, constant: Any) -> bool:
    return type(value) is type(constant) and (
        value == constant or (value != value and constant != constant)
    )  # NaN is itself here


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of {value.dim()} dimensions"
    if isinstance(value, Mapping):
        return f"one with {', '.join(map(str, value)) or 'nothing'}"
    return type(value).__name__ + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
