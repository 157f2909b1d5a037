"""The arguments of a traced model: which a call must give, and what torch assumed of their sizes, as plain data."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.export.graph_signature import ConstantArgument, InputSpec, SymIntArgument, TensorArgument
from torch.utils._pytree import treespec_dumps

from shardsave.errors import UnsupportedModuleError


def refuse(what: str) -> NoReturn:
    raise UnsupportedModuleError(f"cannot save a program: {what}; nothing was written")


class Inputs(Protocol):
    """Of a graph: what stands for an input in it, and what torch traced it with in its place."""

    def written(self, input_name: str) -> Any: ...

    def seen(self, input_name: str) -> Any: ...


def plain(value: Any) -> Any:
    """A scalar as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    refuse(f"plain values were expected, one is a {type(value).__name__}")


class TracedArguments:
    """What a call must give: ``document``, and ``conditions`` on the sizes, in Python's words as torch writes its guards."""

    def __init__(
        self, exported: torch.export.ExportedProgram, module: nn.Module, given: list[InputSpec], inputs: Inputs
    ) -> None:
        self._ranges = exported.range_constraints
        self._inputs = inputs
        self._left = iter(given)
        self._derived: list[str] = []
        #: What a condition may speak of: an argument, as guards write it → what stands for it in the graph; the name of a size → its place.
        self.known: dict[str, Any] = {}
        self.sizes: dict[str, str] = {}
        positional, keyword = json.loads(treespec_dumps(exported.call_spec.in_spec))[1]["children_spec"]
        names, rest, others = _parameters(module)
        self.document: dict[str, Any] = {"positional": [], "keyword": {}}
        for place, tree in enumerate(positional["children_spec"]):
            name = names[place] if place < len(names) else None
            path = f"L[{name!r}]" if name is not None else f"L[{rest!r}][{place - len(names)}]"
            self.document["positional"].append([name, self._tree(tree, path)])
        for name, tree in zip(json.loads(keyword["context"]), keyword["children_spec"]):
            self.document["keyword"][name] = self._tree(tree, f"L[{others!r}][{name!r}]" if name in names else f"L[{name!r}]")
        guards = [" ".join(line.split()) for line in getattr(exported, "_guards_code", [])]
        self.conditions = list(dict.fromkeys([*guards, *self._derived]))

    def _tree(self, tree: dict[str, Any], path: str) -> Any:
        kind, children = tree["type"], tree["children_spec"]
        if kind in ("builtins.tuple", "builtins.list"):
            return {"list": [self._tree(child, f"{path}[{place}]") for place, child in enumerate(children)]}
        if kind in ("builtins.dict", "collections.OrderedDict"):
            keys = json.loads(tree["context"])
            if all(isinstance(key, str) for key in keys):
                return {"dict": {key: self._tree(child, f"{path}[{key!r}]") for key, child in zip(keys, children)}}
        if kind is not None:
            refuse(f"arguments that are tensors, plain values, tuples, lists and dicts were expected, one is a {kind}")
        spec = next(self._left)
        self.known[path] = self._inputs.written(spec.arg.name)
        if isinstance(spec.arg, ConstantArgument):
            return {"constant": plain(spec.arg.value)}
        seen = self._inputs.seen(spec.arg.name)
        if isinstance(spec.arg, SymIntArgument):
            return self._size(seen, path)
        if not isinstance(spec.arg, TensorArgument):
            refuse(f"arguments that are tensors and plain values were expected, {spec.arg.name} is a {type(spec.arg).__name__}")
        shape = [self._size(size, f"{path}.size()[{place}]") for place, size in enumerate(seen.shape)]
        return {"tensor": str(seen.dtype).removeprefix("torch."), "shape": shape}

    def _size(self, size: Any, path: str) -> Any:
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        if isinstance(expression, int) or expression.is_number:
            return int(expression)
        name, bounds = str(expression), self._ranges.get(expression)
        if expression.is_Symbol:
            self.sizes.setdefault(name, path)
        else:
            self._derived.append(f"{path} == {name}")
        least, most = (bounds.lower, bounds.upper) if bounds is not None else (0, 2**63)
        return {"size": name, "min": max(0, int(least)), "max": int(most) if most < 2**62 else None}


def _parameters(module: nn.Module) -> tuple[list[str], str, str]:
    """The names of a forward's positional parameters, and of the tuple and the dict that take the rest."""
    parameters = inspect.signature(module.forward).parameters.values()
    rest = {parameter.kind: parameter.name for parameter in parameters}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    return names, rest.get(inspect.Parameter.VAR_POSITIONAL, ""), rest.get(inspect.Parameter.VAR_KEYWORD, "")


_OPERATORS = {
    ast.Eq: "eq", ast.NotEq: "ne", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Add: "add", ast.Sub: "sub",
    ast.Mult: "mul", ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.Pow: "pow", ast.And: "and_", ast.Or: "or_", ast.Not: "not_",
    ast.USub: "neg",
}  # fmt: skip


class Condition:
    """Writes a condition on the arguments as calls of a graph."""

    def __init__(self, text: str, arguments: TracedArguments, call: Callable[..., Any]) -> None:
        self._text = text
        self._arguments = arguments
        self._call = call
        self.written = self._write(ast.parse(text, mode="eval").body)

    def _operator(self, kind: ast.AST, *values: Any) -> Any:
        if type(kind) not in _OPERATORS:
            refuse(f"conditions on sizes were expected, one is {self._text}")
        return self._call(f"python.{_OPERATORS[type(kind)]}", *values)

    def _write(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return plain(node.value)
        if (known := self._arguments.known.get(ast.unparse(node))) is not None:
            return known
        if isinstance(node, ast.Name) and node.id in self._arguments.sizes:
            return self._write(ast.parse(self._arguments.sizes[node.id], mode="eval").body)
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and ast.unparse(node.value).endswith(".size()")
        ):
            tensor = self._arguments.known.get(ast.unparse(node.value).removesuffix(".size()"))
            if tensor is not None:
                return self._call("aten.sym_size.int", tensor, node.slice.value)
        if isinstance(node, ast.BinOp):
            return self._operator(node.op, self._write(node.left), self._write(node.right))
        if isinstance(node, ast.UnaryOp):
            return self._operator(node.op, self._write(node.operand))
        if isinstance(node, ast.BoolOp):
            return self._all(node.op, [self._write(value) for value in node.values])
        if isinstance(node, ast.Compare):
            values = [self._write(value) for value in (node.left, *node.comparators)]
            return self._all(ast.And(), [self._operator(op, *pair) for op, *pair in zip(node.ops, values, values[1:])])
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Max", "Min"):
            function = f"torch.sym_{ast.unparse(node.func).lower()}"
            return functools.reduce(functools.partial(self._call, function), map(self._write, node.args))
        refuse(f"conditions on sizes were expected, one is {self._text}")

    def _all(self, kind: ast.AST, values: list[Any]) -> Any:
        return functools.reduce(lambda left, right: self._operator(kind, left, right), values)
