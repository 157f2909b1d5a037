"""From a model to a program: what ``torch.export`` traces, written as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.utils._pytree import TreeSpec

from shardsave._program.program import FORMAT, LoadedProgram, ProgramDocument
from shardsave._program.traced_arguments import Condition, TracedArguments, parts_of, plain, refuse
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.wrappers import unwrap
from shardsave.errors import CorruptCheckpointError

Program = Union[tuple[tuple[Any, ...], dict[str, Any]], torch.export.ExportedProgram]

_KINDS = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
_WRITTEN_BACK = {OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION} | {
    kind for kind in OutputKind if kind.name == "PARAMETER_MUTATION"
}


class Captured(NamedTuple):
    document: bytes
    notes: tuple[str, ...]


def check_program(program: object) -> None:
    """Raises TypeError for what is neither the arguments of an example nor an exported program."""
    if isinstance(program, torch.export.ExportedProgram):
        return
    if isinstance(program, tuple) and len(program) == 2 and isinstance(program[0], tuple) and isinstance(program[1], dict):
        return
    raise TypeError("program must be (args, kwargs), a tuple and a dict for the model's forward, or an ExportedProgram")


def capture(module: nn.Module, program: Program, extra: ExtraTensors) -> Captured:
    """The program of ``module`` as JSON; tensors that are no weights are added to ``extra``. Raises UnsupportedModuleError."""
    module = unwrap(module)
    if isinstance(program, torch.export.ExportedProgram):
        exported, training = program, None
    else:
        exported, training = _export(module, *program), module.training
    _refuse_other_weights(module, exported)
    signature = exported.graph_signature
    others = [spec for spec in signature.input_specs if spec.kind not in {*_KINDS, InputKind.USER_INPUT}]
    if others:
        refuse(f"inputs that are tensors and plain values were expected, {others[0].arg.name} is a {others[0].kind.name}")
    graphs: list[Any] = [None]
    main = _Writer(exported.graph_module, graphs, 0)
    named = [spec for spec in signature.input_specs if spec.kind in _KINDS]
    given = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    main.take_inputs([spec.arg.name for spec in [*named, *given]])
    arguments = TracedArguments(exported, module, given, main)
    main.check(arguments)
    given_back = main.take_calls()
    flat = given_back["tuple"] if isinstance(given_back, dict) else given_back
    written = [spec for spec in signature.output_specs if spec.kind in _WRITTEN_BACK]
    if any(spec.kind not in {*_WRITTEN_BACK, OutputKind.USER_OUTPUT} for spec in signature.output_specs[len(written) :]):
        refuse("results that are a forward's were expected, it has others")
    results = iter(flat[len(written) :])
    nest = _nested(exported.call_spec.out_spec, results)
    places = {
        spec.target if spec.kind is not InputKind.USER_INPUT else spec.arg.name: n for n, spec in enumerate([*named, *given])
    }
    graphs[0] = main.graph({"tuple": [flat[: len(written)], nest]})
    document = {
        "format": FORMAT,
        "version": 1,
        "requires": [],
        "torch": torch.__version__,
        "training": training,
        "tensors": [_place(exported, spec, extra) for spec in named],
        "arguments": arguments.document,
        "mutations": [places[spec.target] for spec in written],
        "graphs": graphs,
    }
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    try:
        read = ProgramDocument(data, "the program", torch.device("cpu"))
        LoadedProgram(read, {place.name: torch.empty(0, device="meta") for place in read.places})
    except CorruptCheckpointError as error:
        refuse(str(error).removeprefix("corrupt the program: ").removesuffix("; nothing was run"))
    mode = (
        "the program computes as in training mode, in which the model is; call eval() first for one to run a trained model with"
    )
    return Captured(data, (mode,) if training else ())


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs)
    except Exception as error:
        refuse(f"torch.export was expected to trace the model, it raised {type(error).__name__}: {str(error).splitlines()[0]}")


def _refuse_other_weights(module: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """An exported program holds the tensors that it was traced with; those of another model would be stored beside this one's."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in exported.state_dict.items():
        if name not in own or own[name].data_ptr() != tensor.data_ptr() or own[name].shape != tensor.shape:
            refuse(f"a program of the model's own weights was expected, its {name} is another tensor")


def _place(exported: torch.export.ExportedProgram, spec: InputSpec, extra: ExtraTensors) -> dict[str, Any]:
    name = str(spec.target)
    tensor = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    try:
        stored, kept = extra.place(tensor, name)
    except RuntimeError as error:  # of torch.func, whose tensors stand for others
        refuse(f"tensors with memory of their own were expected, {name} has none ({str(error).splitlines()[0]})")
    # A buffer that no state dict has is not one of a program's either.
    kind = "constant" if spec.kind is InputKind.BUFFER and not spec.persistent else _KINDS[spec.kind]
    trained = kind == "parameter" and tensor.requires_grad
    return {"name": name, "tensor": stored, "kept": kept, "kind": kind, "requires_grad": trained}


class _Writer:
    """Writes one graph of fx as a list of calls; those that it calls are added to ``graphs``, behind it."""

    def __init__(self, module: fx.GraphModule, graphs: list[Any], number: int) -> None:
        self._module = module
        self._graphs = graphs
        self._number = number
        self._written: dict[fx.Node, Any] = {}
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._inputs = 0
        self._calls: list[Any] = []

    def take_inputs(self, names: list[str]) -> None:
        self._inputs = len(names)
        for place, name in enumerate(names):
            self._written[self._nodes[name]] = {"value": place}

    def written(self, input_name: str) -> Any:
        return self._written[self._nodes[input_name]]

    def seen(self, input_name: str) -> Any:
        """What torch traced the graph with in the place of an input."""
        return self._nodes[input_name].meta["val"]

    def call(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        self._calls.append([function, list(arguments), keywords])
        return {"value": self._inputs + len(self._calls) - 1}

    def check(self, arguments: TracedArguments) -> None:
        """Makes the graph begin with what torch assumed of its arguments."""
        for condition in arguments.conditions:
            holds = Condition(condition, arguments, self.call).written
            self.call("aten._assert_scalar.default", holds, f"the program was exported for arguments of which {condition}")

    def take_calls(self) -> Any:
        """Writes all that is called; what the graph gives back."""
        for node in self._module.graph.nodes:
            if node.op == "get_attr":
                self._written[node] = {"graph": self._graph_of(node)}
            elif node.op == "call_function":
                name, arguments = _name_of(node.target), list(node.args)
                if name == "higher_order.wrap_with_autocast":
                    arguments[0] = torch.device(arguments[0])
                written = [self._value(value) for value in arguments]
                self._written[node] = self.call(name, *written, **{name: self._value(v) for name, v in node.kwargs.items()})
            elif node.op == "output":
                return self._value(node.args[0])
            elif node not in self._written:
                refuse(f"a graph of operators was expected, it has a {node.op} {node.target}")
        return None

    def graph(self, result: Any) -> dict[str, Any]:
        return {"inputs": self._inputs, "calls": self._calls, "result": result}

    def _graph_of(self, node: fx.Node) -> int:
        inner = self._module
        for part in str(node.target).split("."):
            inner = getattr(inner, part)
        if not isinstance(inner, fx.GraphModule):
            refuse(f"a graph of operators was expected, it has {node.target}, a {type(inner).__name__}")
        number = len(self._graphs)
        self._graphs.append(None)
        writer = _Writer(inner, self._graphs, number)
        writer.take_inputs([node.name for node in inner.graph.nodes if node.op == "placeholder"])
        self._graphs[number] = writer.graph(writer.take_calls())
        return number

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._written[value]
        if isinstance(value, torch.SymInt) and value.node.expr.is_number:
            return int(value.node.expr)
        if isinstance(value, complex):
            return {"complex": [plain(value.real), plain(value.imag)]}
        if isinstance(value, tuple):
            return {"tuple": [self._value(part) for part in value]}
        if isinstance(value, list):
            return [self._value(part) for part in value]
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {"dict": {name: self._value(part) for name, part in value.items()}}
        for tag in ("dtype", "layout", "memory_format", "device"):
            if isinstance(value, getattr(torch, tag)):
                return {tag: str(value).removeprefix("torch.")}
        return plain(value)


def _name_of(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"higher_order.{function.__name__}"
    module = str(getattr(function, "__module__", None)).split(".")[0]
    return f"{ {'_operator': 'python'}.get(module, module) }.{getattr(function, '__name__', function)}"


def _nested(tree: TreeSpec, following: Iterator[Any]) -> Any:
    """The results of a forward, as it nests them; those of classes that name their parts, as dicts."""
    kind, names, children = parts_of(tree)
    if kind is None:
        return next(following)
    parts = [_nested(child, following) for child in children]
    if kind is dict:
        return {"dict": dict(zip(names, parts))}
    return parts if kind is list else {"tuple": parts}
