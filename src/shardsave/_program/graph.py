"""Reads the graphs of a program from a document, and runs them.

Nothing in a graph is evaluated, compiled or imported. Each call names one function or operator (`operators.py`) and has plain values as
arguments. A graph runs one call after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardsave._program.operators import check_arguments, find_function
from shardsave._program.refusals import BadProgram

#: How deep values may be nested: deeper than in any model, and far from the limit of Python's stack.
MAX_DEPTH = 32


def _torch_constants(kind: type, except_for: str) -> dict[str, Any]:
    """Name → constant, for all constants of torch that are a ``kind``, except names that match ``except_for``."""
    constants = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}
    return {name: value for name, value in constants.items() if not re.fullmatch(except_for, name)}


#: Name → dtype, without dtypes of quantized tensors and dtypes for which torch has a name but no operators.
DTYPES = _torch_constants(torch.dtype, r"q\w+|bits\w+|u?int[1-7]")
_CONSTANTS = {
    "dtype": DTYPES,
    "layout": {"strided": torch.strided},
    "memory_format": _torch_constants(torch.memory_format, ""),
}

_DEVICE = re.compile(r"[a-z]+(?::\d{1,3})?", re.ASCII)
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Value:
    """A value of a graph, by its number: the inputs come first, then the results of the calls, in order."""

    number: int


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    last_uses: tuple[int, ...]  # numbers of the values that no later call needs


class Graph:
    """A list of calls. ``inputs``: the number of input values. ``result``: a value of the graph, or a nest of values."""

    def __init__(self, inputs: int, calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]], result: Any) -> None:
        self.inputs = inputs
        self.result = result
        # A value is released after its last use, as Python does while it runs a forward.
        last_call: dict[int, int] = {}
        for place, (_, arguments, keywords) in enumerate(calls):
            last_call[inputs + place] = place
            last_call.update((number, place) for number in _numbers_in([arguments, keywords]))
        for number in _numbers_in(result):
            last_call.pop(number, None)
        last_uses: dict[int, list[int]] = {}
        for number, place in last_call.items():
            last_uses.setdefault(place, []).append(number)
        self._calls = [_Call(*call, tuple(last_uses.get(place, ()))) for place, call in enumerate(calls)]

    def __call__(self, *inputs: Any) -> Any:
        if len(inputs) != self.inputs:
            raise TypeError(f"a graph with {self.inputs} inputs was called with {len(inputs)}")
        values: list[Any] = list(inputs)
        for function, arguments, keywords, last_uses in self._calls:
            values.append(function(*_filled_in(arguments, values), **_filled_in(keywords, values)))
            for number in last_uses:
                values[number] = None
        return _filled_in(self.result, values)


def _numbers_in(nest: Any) -> list[int]:
    """The numbers of all values in ``nest``."""
    if isinstance(nest, Value):
        return [nest.number]
    parts: Any = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, (list, tuple)) else ()
    return [number for part in parts for number in _numbers_in(part)]


def _filled_in(nest: Any, values: Sequence[Any]) -> Any:
    """``nest`` with each Value replaced by the value of that number."""
    kind = type(nest)
    if kind is Value:
        return values[nest.number]
    if kind is list:
        return [_filled_in(part, values) for part in nest]
    if kind is tuple:
        return tuple(_filled_in(part, values) for part in nest)
    if kind is dict:
        return {name: _filled_in(part, values) for name, part in nest.items()}
    return nest


class GraphReader:
    """Reads the graphs of a document, with ``device`` in place of every device that they name. Raises BadProgram."""

    def __init__(self, graphs: Any, device: torch.device) -> None:
        if not isinstance(graphs, list) or not graphs:
            raise BadProgram("graphs", "a list of graphs", graphs)
        self._documents = graphs
        self._device = device
        self._graphs: dict[int, Graph] = {}

    def graph(self, number: int) -> Graph:
        # The last graph is read first. A graph calls only later ones, so there is no cycle, and the length of the list bounds the depth of
        # calls.
        for later in range(len(self._documents) - 1, number - 1, -1):
            if later not in self._graphs:
                self._graphs[later] = self._read(later)
        return self._graphs[number]

    def _read(self, number: int) -> Graph:
        where, document = f"graphs[{number}]", self._documents[number]
        if not isinstance(document, dict) or document.keys() != {"inputs", "calls", "result"}:
            raise BadProgram(where, "inputs, calls and a result", document)
        inputs, call_documents = document["inputs"], document["calls"]
        if type(inputs) is not int or inputs < 0 or not isinstance(call_documents, list):
            raise BadProgram(where, "a number of inputs and a list of calls", document)
        calls = []
        for place, call in enumerate(call_documents):
            call_where, known = f"{where}.calls[{place}]", inputs + place
            if not isinstance(call, list) or len(call) != 3 or not isinstance(call[1], list) or not isinstance(call[2], dict):
                raise BadProgram(call_where, "a function, its arguments and its keywords", call)
            function = find_function(call[0], call_where)
            arguments = [self._value(part, known, number, call_where) for part in call[1]]
            keywords = self._named_values(call[2], known, number, call_where)
            check_arguments(function, arguments, keywords, call_where)
            calls.append((function, arguments, keywords))
        return Graph(inputs, calls, self._value(document["result"], inputs + len(calls), number, f"{where}.result"))

    def _named_values(self, parts: Mapping[str, Any], known: int, number: int, where: str, depth: int = 0) -> dict[str, Any]:
        return {name: self._value(part, known, number, where, depth) for name, part in parts.items()}

    def _value(self, value: Any, known: int, number: int, where: str, depth: int = 0) -> Any:
        """Reads a scalar, a list, or an object with one tag. ``known``: how many inputs and results graph ``number`` has so far."""
        if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
            return value
        if depth > MAX_DEPTH:
            raise BadProgram(where, f"values nested at most {MAX_DEPTH} deep", value)
        if isinstance(value, list):
            return [self._value(part, known, number, where, depth + 1) for part in value]
        tag, content = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
        if tag == "value" and type(content) is int and 0 <= content < known:
            return Value(content)
        if tag == "graph" and type(content) is int and number < content < len(self._documents):
            return self._graphs[content]
        if tag == "tuple" and isinstance(content, list):
            return tuple(self._value(part, known, number, where, depth + 1) for part in content)
        if tag == "dict" and isinstance(content, dict):
            return self._named_values(content, known, number, where, depth + 1)
        if tag == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
            return self._device
        if tag == "float" and isinstance(content, str) and content in FLOATS:
            return FLOATS[content]
        if tag == "complex" and isinstance(content, list) and len(content) == 2:
            real, imaginary = (self._value(part, known, number, where, depth + 1) for part in content)
            if type(real) is float and type(imaginary) is float:
                return complex(real, imaginary)
        if tag in _CONSTANTS and isinstance(content, str):
            if content not in _CONSTANTS[tag]:
                raise BadProgram(where, f"a {tag} of torch {torch.__version__}", content)
            return _CONSTANTS[tag][content]
        raise BadProgram(where, "a value of the graph or a plain value", value)
