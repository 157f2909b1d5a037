"""Writes the program of a model: the graph that ``torch.export`` traces, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec
from torch.utils._pytree import TreeSpec

from shardsave._program.program import FORMAT, LoadedProgram, ProgramDocument
from shardsave._program.refusals import refuse_to_save
from shardsave._program.traced_arguments import Condition, TracedArguments, parts_of, plain
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.offload import offloaded_tensors
from shardsave.errors import CorruptCheckpointError

Program = Union[tuple[tuple[Any, ...], dict[str, Any]], torch.export.ExportedProgram]

_TENSOR_KINDS = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
_MUTATIONS = {OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION} | {
    kind for kind in OutputKind if kind.name == "PARAMETER_MUTATION"
}


class Captured(NamedTuple):
    document: bytes
    notes: tuple[str, ...]


def check_program(program: object) -> None:
    """Raises TypeError unless ``program`` holds the arguments of an example call, or is an exported program."""
    if isinstance(program, torch.export.ExportedProgram):
        return
    if isinstance(program, tuple) and len(program) == 2 and isinstance(program[0], tuple) and isinstance(program[1], dict):
        return
    raise TypeError("program must be (args, kwargs), a tuple and a dict for the model's forward, or an ExportedProgram")


def capture(module: nn.Module, program: Program, extra: ExtraTensors) -> Captured:
    """The program of ``module``, as JSON. Tensors that are not weights are added to ``extra``. Raises UnsupportedModuleError."""
    if offloaded_tensors(module, fill=False):  # torch.export would leave its own tensors in the place of the placeholders
        refuse_to_save("a model in memory was expected, accelerate offloads it; remove accelerate's hooks first")
    if isinstance(program, torch.export.ExportedProgram):
        exported, training = program, None
    else:
        exported, training = _export(module, *program), module.training
    _refuse_other_weights(module, exported)
    tensor_specs, argument_specs = _input_specs(exported)
    input_specs = [*tensor_specs, *argument_specs]
    graphs: list[Any] = [None]
    writer = _GraphWriter(exported.graph_module, graphs)
    writer.add_inputs([spec.arg.name for spec in input_specs])
    arguments = TracedArguments(exported, module, argument_specs, writer)
    writer.add_checks(arguments)
    graph_result = writer.add_calls()
    values = graph_result["tuple"] if isinstance(graph_result, dict) else graph_result
    mutation_specs = _mutation_specs(exported)
    forward_result = _nest(exported.call_spec.out_spec, iter(values[len(mutation_specs) :]))
    graphs[0] = writer.graph({"tuple": [values[: len(mutation_specs)], forward_result]})
    input_numbers = {
        spec.target if spec.kind is not InputKind.USER_INPUT else spec.arg.name: number
        for number, spec in enumerate(input_specs)
    }
    document = {
        "format": FORMAT,
        "version": 1,
        "requires": [],
        "torch": torch.__version__,
        "training": training,
        "tensors": [_place(exported, spec, extra) for spec in tensor_specs],
        "arguments": arguments.document,
        "mutations": [input_numbers[spec.target] for spec in mutation_specs],
        "graphs": graphs,
    }
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    _check_readable(data)
    note = (
        "the model is in training mode, so its program always computes as in training mode; call eval() before saving a program "
        "that runs a trained model"
    )
    return Captured(data, (note,) if training else ())


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, args, kwargs)
    except Exception as error:
        refuse_to_save(
            f"torch.export was expected to trace the model, it raised {type(error).__name__}: {str(error).splitlines()[0]}"
        )


def _refuse_other_weights(module: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """Refuses an exported program of another model: its weights would be stored in addition to those of ``module``."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in exported.state_dict.items():
        if name not in own or own[name].data_ptr() != tensor.data_ptr() or own[name].shape != tensor.shape:
            refuse_to_save(f"a program of the model's own weights was expected, its {name} is another tensor")


def _input_specs(exported: torch.export.ExportedProgram) -> tuple[list[InputSpec], list[InputSpec]]:
    """The inputs of the graph: first those that are tensors of the model, then those that are arguments of a call."""
    specs = exported.graph_signature.input_specs
    for spec in specs:
        if spec.kind not in {*_TENSOR_KINDS, InputKind.USER_INPUT}:
            refuse_to_save(f"inputs that are tensors and plain values were expected, {spec.arg.name} is a {spec.kind.name}")
    tensor_specs = [spec for spec in specs if spec.kind in _TENSOR_KINDS]
    return tensor_specs, [spec for spec in specs if spec.kind is InputKind.USER_INPUT]


def _mutation_specs(exported: torch.export.ExportedProgram) -> list[OutputSpec]:
    """The results of the graph that overwrite one of its inputs. They come before the results of the forward."""
    specs = exported.graph_signature.output_specs
    mutation_specs = [spec for spec in specs if spec.kind in _MUTATIONS]
    if any(spec.kind not in {*_MUTATIONS, OutputKind.USER_OUTPUT} for spec in specs[len(mutation_specs) :]):
        refuse_to_save("results of the model's forward were expected, the exported program has other outputs")
    return mutation_specs


def _place(exported: torch.export.ExportedProgram, spec: InputSpec, extra: ExtraTensors) -> dict[str, Any]:
    name = str(spec.target)
    tensor = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    try:
        stored, kept = extra.place(tensor, name)
    except RuntimeError as error:  # a tensor of torch.func wraps another tensor
        refuse_to_save(f"tensors with memory of their own were expected, {name} has none ({str(error).splitlines()[0]})")
    # A non-persistent buffer is not in the state dict of the model, so it must not be in that of the program either.
    kind = "constant" if spec.kind is InputKind.BUFFER and not spec.persistent else _TENSOR_KINDS[spec.kind]
    requires_grad = kind == "parameter" and tensor.requires_grad
    return {"name": name, "tensor": stored, "kept": kept, "kind": kind, "requires_grad": requires_grad}


def _check_readable(data: bytes) -> None:
    """Refuses a document that `load_program` would refuse."""
    try:
        document = ProgramDocument(data, "the program", torch.device("cpu"))
        LoadedProgram(document, {place.name: torch.empty(0, device="meta") for place in document.places})
    except CorruptCheckpointError as error:
        refuse_to_save(str(error).removeprefix("corrupt the program: ").removesuffix("; nothing was run"))


class _GraphWriter:
    """Writes one fx graph as a list of calls. Graphs that it calls are appended to ``graphs``."""

    def __init__(self, module: fx.GraphModule, graphs: list[Any]) -> None:
        self._module = module
        self._graphs = graphs
        self._written: dict[fx.Node, Any] = {}
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._inputs = 0
        self._calls: list[Any] = []

    def add_inputs(self, names: list[str]) -> None:
        self._inputs = len(names)
        for number, name in enumerate(names):
            self._written[self._nodes[name]] = {"value": number}

    def written(self, input_name: str) -> Any:
        return self._written[self._nodes[input_name]]

    def traced_with(self, input_name: str) -> Any:
        return self._nodes[input_name].meta["val"]

    def call(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        self._calls.append([function, list(arguments), keywords])
        return {"value": self._inputs + len(self._calls) - 1}

    def add_checks(self, arguments: TracedArguments) -> None:
        """Writes calls that check what torch assumed about the arguments; the graph begins with them."""
        for condition in arguments.conditions:
            holds = Condition(condition, arguments, self.call).written
            self.call("aten._assert_scalar.default", holds, f"the program was exported for arguments of which {condition}")

    def add_calls(self) -> Any:
        """Writes every call of the graph. Returns the graph's result in the form of the document."""
        for node in self._module.graph.nodes:
            if node.op == "get_attr":
                self._written[node] = {"graph": self._add_graph(node)}
            elif node.op == "call_function":
                name, arguments = _function_name(node.target), list(node.args)
                if name == "higher_order.wrap_with_autocast":
                    arguments[0] = torch.device(arguments[0])
                written = [self._value(value) for value in arguments]
                keywords = {key: self._value(value) for key, value in node.kwargs.items()}
                self._written[node] = self.call(name, *written, **keywords)
            elif node.op == "output":
                return self._value(node.args[0])
            elif node not in self._written:
                refuse_to_save(f"a graph of operators was expected, it has a {node.op} {node.target}")
        return None

    def graph(self, result: Any) -> dict[str, Any]:
        return {"inputs": self._inputs, "calls": self._calls, "result": result}

    def _add_graph(self, node: fx.Node) -> int:
        inner = self._module
        for part in str(node.target).split("."):
            inner = getattr(inner, part)
        if not isinstance(inner, fx.GraphModule):
            refuse_to_save(f"a graph of operators was expected, it has {node.target}, a {type(inner).__name__}")
        number = len(self._graphs)
        self._graphs.append(None)
        writer = _GraphWriter(inner, self._graphs)
        writer.add_inputs([node.name for node in inner.graph.nodes if node.op == "placeholder"])
        self._graphs[number] = writer.graph(writer.add_calls())
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


def _function_name(function: Any) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return str(function)
    if isinstance(function, torch._ops.HigherOrderOperator):
        return f"higher_order.{function.__name__}"
    module = str(getattr(function, "__module__", None)).split(".")[0]
    return f"{ {'_operator': 'python'}.get(module, module) }.{getattr(function, '__name__', function)}"


def _nest(tree: TreeSpec, values: Iterator[Any]) -> Any:
    """The next ``values``, nested as a forward nests its results. Classes that name their parts become dicts."""
    kind, names, children = parts_of(tree)
    if kind is None:
        return next(values)
    parts = [_nest(child, values) for child in children]
    if kind is dict:
        return {"dict": dict(zip(names, parts))}
    return parts if kind is list else {"tuple": parts}
