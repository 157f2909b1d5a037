"""The arguments of a traced model, as data: which ones a call must pass, and what torch assumed about their sizes."""

from __future__ import annotations

import ast
import collections
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument, InputSpec, SymIntArgument, TensorArgument
from torch.utils._pytree import TreeSpec

from shardsave._common.strict_json import glimpse
from shardsave._program.operators import FUNCTIONS
from shardsave._program.refusals import refuse_to_save


class Inputs(Protocol):
    """The inputs of a graph, by name."""

    def written(self, input_name: str) -> Any:
        """How the document refers to an input."""

    def traced_with(self, input_name: str) -> Any:
        """The value that torch traced the graph with in place of an input."""


def plain(value: Any) -> Any:
    """A scalar in the form of the document."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    refuse_to_save(f"plain values were expected, one is a {type(value).__name__}")


class TracedArguments:
    """``document``: the arguments that a call must pass. ``conditions``: Python expressions about sizes, in the form of guards."""

    def __init__(
        self, exported: torch.export.ExportedProgram, module: nn.Module, specs: list[InputSpec], inputs: Inputs
    ) -> None:
        self._ranges = exported.range_constraints
        self._inputs = inputs
        self._unused_specs = iter(specs)
        self._derived: list[tuple[str, Any]] = []
        #: What a condition may refer to: an argument in a guard → how the document refers to it; the name of a size → an expression for it.
        self.arguments: dict[str, Any] = {}
        self.sizes: dict[str, str] = {}
        positional, keyword = (parts_of(tree) for tree in parts_of(exported.call_spec.in_spec).children)
        names, var_positional = _positional_parameters(module)
        self.document: dict[str, Any] = {"positional": [], "keyword": {}}
        for place, tree in enumerate(positional.children):
            name = names[place] if place < len(names) else None
            path = f"L[{name!r}]" if name is not None else f"L[{var_positional!r}][{place - len(names)}]"
            self.document["positional"].append([name, self._tree(tree, path)])
        for keyword_name, tree in zip(keyword.names, keyword.children):
            self.document["keyword"][keyword_name] = self._tree(tree, f"L[{keyword_name!r}]")
        guards = [" ".join(line.split()) for line in getattr(exported, "_guards_code", [])]
        self.conditions = list(dict.fromkeys([*guards, *self._conditions_on_derived_sizes()]))

    def _tree(self, tree: TreeSpec, path: str) -> Any:
        kind, names, children = parts_of(tree)
        if kind in (tuple, list):
            return {"list": [self._tree(child, f"{path}[{place}]") for place, child in enumerate(children)]}
        if kind is dict and tree.type in (dict, collections.OrderedDict, collections.defaultdict):
            return {"dict": {name: self._tree(child, f"{path}[{name!r}]") for name, child in zip(names, children)}}
        if kind is not None:
            refuse_to_save(
                f"arguments that are tensors, plain values, tuples, lists and dicts were expected, one is a {tree.type.__name__}"
            )
        spec = next(self._unused_specs)
        self.arguments[path] = self._inputs.written(spec.arg.name)
        if isinstance(spec.arg, ConstantArgument):
            return {"constant": plain(spec.arg.value)}
        value = self._inputs.traced_with(spec.arg.name)
        if isinstance(spec.arg, SymIntArgument):
            return self._size(value, path)
        if not isinstance(spec.arg, TensorArgument):
            refuse_to_save(
                f"arguments that are tensors and plain values were expected, {spec.arg.name} is a {type(spec.arg).__name__}"
            )
        shape = [self._size(size, f"{path}.size()[{place}]") for place, size in enumerate(value.shape)]
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": shape}

    def _size(self, size: Any, path: str) -> Any:
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        if isinstance(expression, int) or expression.is_number:
            return int(expression)
        name, bounds = str(expression), self._ranges.get(expression)
        if expression.is_Symbol:
            self.sizes.setdefault(name, path)
        else:
            self._derived.append((path, expression))
        least, most = (bounds.lower, bounds.upper) if bounds is not None else (0, 2**63)
        return {"size": name, "min": max(0, int(least)), "max": int(most) if most < 2**62 else None}

    def _conditions_on_derived_sizes(self) -> Iterator[str]:
        """A condition for each size that torch computes from other sizes. Adds symbols that occur only in these to ``sizes``."""
        for path, expression in self._derived:
            yield f"{path} == {expression}"
            for symbol in expression.free_symbols:
                if str(symbol) in self.sizes:
                    continue
                factor, rest = expression.coeff(symbol), expression - expression.coeff(symbol) * symbol
                if not (factor.is_Integer and rest.is_Integer):
                    refuse_to_save(
                        f"sizes that are a multiple of another size, plus a number, were expected, one is {expression}"
                    )
                self.sizes[str(symbol)] = f"({path} - {rest}) // {factor}"


class Parts(NamedTuple):
    """The parts of a nest of arguments or results. ``kind``: tuple, list, or dict (with ``names``); None for a leaf."""

    kind: type | None
    names: list[str]
    children: list[TreeSpec]


def parts_of(tree: TreeSpec) -> Parts:
    """A class that names its parts counts as a dict, a named tuple as a tuple."""
    if tree.is_leaf():
        return Parts(None, [], [])
    children = list(tree.children() if hasattr(tree, "children") else tree.children_specs)
    if tree.type is list:
        return Parts(list, [], children)
    if tree.type is collections.namedtuple or (isinstance(tree.type, type) and issubclass(tree.type, tuple)):
        return Parts(tuple, [], children)
    context = tree.context if isinstance(tree.context, (list, tuple)) else []
    for names in (context, *context):  # in some classes the context is the list of names, in other classes it contains the list
        if isinstance(names, (list, tuple)) and len(names) == len(children) and all(isinstance(name, str) for name in names):
            return Parts(dict, list(names), children)
    refuse_to_save(
        f"tensors, plain values, tuples, lists, and dicts with text keys were expected, there is a {tree.type.__name__} of "
        f"{glimpse(context)}"
    )


def _positional_parameters(module: nn.Module) -> tuple[list[str], str]:
    """The names of a forward's positional parameters, and the name of its ``*args``."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    var_positional = next(
        (parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_POSITIONAL), ""
    )
    return [parameter.name for parameter in parameters if parameter.kind in positional], var_positional


_OPERATORS = {
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Add: "add", ast.Sub: "sub",
    ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.Pow: "pow", ast.And: "and_", ast.Or: "or_",
    ast.Not: "not_", ast.USub: "neg",
}  # fmt: skip


class Condition:
    """Writes a condition on the arguments as calls of a graph. ``written``: how the document refers to its result."""

    def __init__(self, text: str, traced: TracedArguments, call: Callable[..., Any]) -> None:
        self._text = text
        self._traced = traced
        self._call = call
        self.written = self._write(ast.parse(text, mode="eval").body)

    def _operator(self, kind: ast.AST, *values: Any) -> Any:
        if type(kind) not in _OPERATORS:
            refuse_to_save(f"conditions on sizes were expected, one is {self._text}")
        return self._call(f"python.{_OPERATORS[type(kind)]}", *values)

    def _write(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return plain(node.value)
        if (argument := self._traced.arguments.get(ast.unparse(node))) is not None:
            return argument
        if isinstance(node, ast.Name) and node.id in self._traced.sizes:
            return self._write(ast.parse(self._traced.sizes[node.id], mode="eval").body)
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and ast.unparse(node.value).endswith(".size()")
        ):
            tensor = self._traced.arguments.get(ast.unparse(node.value).removesuffix(".size()"))
            if tensor is not None:
                return self._call("aten.sym_size.int", tensor, node.slice.value)
        if isinstance(node, ast.BinOp):
            return self._operator(node.op, self._write(node.left), self._write(node.right))
        if isinstance(node, ast.UnaryOp):
            return self._operator(node.op, self._write(node.operand))
        if isinstance(node, ast.BoolOp):
            return self._joined(node.op, [self._write(value) for value in node.values])
        if isinstance(node, ast.Compare):
            values = [self._write(value) for value in (node.left, *node.comparators)]
            return self._joined(ast.And(), [self._operator(op, *pair) for op, *pair in zip(node.ops, values, values[1:])])
        if isinstance(node, ast.Call):
            name, values = ast.unparse(node.func), [self._write(value) for value in node.args]
            if name in ("max", "min", "Max", "Min"):
                return functools.reduce(functools.partial(self._call, f"torch.sym_{name.lower()}"), values)
            if name in FUNCTIONS:
                return self._call(name, *values)
        refuse_to_save(f"conditions on sizes were expected, one is {self._text}")

    def _joined(self, operator: ast.AST, values: list[Any]) -> Any:
        return functools.reduce(lambda left, right: self._operator(operator, left, right), values)
