"""What a model computes, as a graph of torch's operators (``torch.export``), for where its classes are not installed.

torch writes a graph as JSON, and everything else beside it by pickle. We keep the JSON alone: weights are named, as in an architecture,
examples and traces are left out. torch also *reads* that JSON with ``eval`` and ``getattr``, so nothing of it reaches torch before
each string that it would evaluate, look up or make source code of has been found to be of a harmless form.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Union

import torch
from torch import nn

from shardsave._extra_tensors import ExtraTensors
from shardsave._json import NotJSON, glimpse, parse_object
from shardsave._state import unwrap
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UnsupportedModuleError

Program = Union[tuple[tuple[Any, ...], dict[str, Any]], torch.export.ExportedProgram]

FORMAT = "shardsave-program"

_HIGHER = "cond map_impl scan while_loop wrap_with_autocast wrap_with_set_grad_enabled"
_OPERATORS = "add and_ eq floordiv ge getitem gt le lt mod mul ne neg not_ or_ pos pow sub truediv"
_TARGET = re.compile(
    r"torch\.ops\.(?:aten|prims)\.(?!from_file\b|save\b)[a-z_]\w*\.\w+|"
    rf"torch\.ops\.higher_order\.(?:{'|'.join(_HIGHER.split())})|"
    rf"_operator\.(?:{'|'.join(_OPERATORS.split())})|"
    r"torch\.(?:sym_float|sym_int|sym_ite|sym_max|sym_min|sym_not|sym_sum|_sym_sqrt)|math\.(?:ceil|floor|sqrt|trunc)",
    re.ASCII,
)

#: Expressions over sizes: numbers, symbols, and these functions.
_SYMBOL = re.compile(r"[suz]\d+", re.ASCII)
_WRITTEN_SYMBOL = re.compile(r"Symbol\('([suz]\d+)'(?:, [a-z_]+=(?:True|False))*\)", re.ASCII)
_EXPRESSION = re.compile(r"[\w\s()+*/%<>=!&|~,.-]*", re.ASCII)
_FUNCTIONS = frozenset([
    "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "False", "Float", "FloatPow", "FloatTrueDiv", "FloorDiv",
    "FloorToInt", "Ge", "Gt", "Identity", "IntTrueDiv", "Integer", "Le", "Lt", "Max", "Min", "Mod", "ModularIndexing",
    "Mul", "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod", "Rational", "RoundToInt", "ToFloat", "True",
    "TruncToInt", "Where", "false", "int_oo", "oo", "true",
])  # fmt: skip
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DOTTED = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*", re.ASCII)
_CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})


def check_program(program: object) -> None:
    """Raises TypeError for what is neither the arguments of an example nor an exported program."""
    if program is None or isinstance(program, torch.export.ExportedProgram):
        return
    if isinstance(program, tuple) and len(program) == 2 and isinstance(program[0], tuple) and isinstance(program[1], dict):
        return
    raise TypeError("program must be (args, kwargs), a tuple and a dict for the model's forward, or an ExportedProgram")


def capture(module: nn.Module, program: Program, extra: ExtraTensors) -> bytes:
    """The program of ``module`` as JSON; constants that are no weights are added to ``extra``. Raises UnsupportedModuleError."""
    from torch._export.serde import serialize

    module = unwrap(module)
    if isinstance(program, torch.export.ExportedProgram):
        exported = program
    else:
        try:
            exported = torch.export.export(module, program[0], program[1])
        except Exception as error:
            _refuse(
                f"torch.export was expected to trace the model, it raised {type(error).__name__}: {str(error).splitlines()[0]}"
            )
    others = [name for name, value in exported.constants.items() if not isinstance(value, torch.Tensor)]
    if others:
        _refuse(f"constants that are tensors were expected, {others[0]} is a {type(exported.constants[others[0]]).__name__}")
    try:
        artifact = serialize.serialize(
            exported, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
        )
    except Exception as error:  # arguments or results of classes that torch does not write
        _refuse(
            f"torch was expected to write what it traced, it raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
    graph = json.loads(artifact.exported_program)
    _make_plain(graph)
    problems = list(_problems(graph))
    if problems:
        _refuse(f"{problems[0]}; and {len(problems) - 1} more" if len(problems) > 1 else problems[0])
    trained = dict(module.named_parameters(remove_duplicate=False))

    def places(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        made = {}
        for name, tensor in tensors.items():
            stored, kept = extra.place(tensor, name)
            made[name] = {"tensor": stored, "parameter": isinstance(tensor, nn.Parameter) or name in trained, "kept": kept}
        return made

    document = {
        "format": FORMAT,
        "version": 1,
        "requires": [],
        "torch": torch.__version__,
        "state": places(exported.state_dict),
        "constants": places(exported.constants),
        "graph": graph,
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModuleError(f"cannot save a program: {what}; nothing was written")


def _make_plain(graph: dict[str, Any]) -> None:
    """Leaves out where the model's source was, and gives results of the model's own classes as dicts."""
    graph["guards_code"] = []
    module = graph["graph_module"]
    module["module_call_graph"] = [call for call in module["module_call_graph"] if call["fqn"] == ""]
    for nodes in _find(graph, "nodes"):
        for node in nodes:
            node["metadata"] = {}
    for call in module["module_call_graph"]:
        for spec in ("in_spec", "out_spec"):
            version, tree = json.loads(call["signature"][spec])
            _as_dicts(tree)
            call["signature"][spec] = json.dumps([version, tree])


def _as_dicts(tree: dict[str, Any]) -> None:
    if tree["type"] not in _CONTAINERS:
        keys = json.loads(tree["context"]) if isinstance(tree["context"], str) else None
        if isinstance(keys, list) and len(keys) == len(tree["children_spec"]) and all(isinstance(key, str) for key in keys):
            tree["type"] = "builtins.dict"
    for child in tree["children_spec"]:
        _as_dicts(child)


def _find(value: Any, key: str) -> Iterator[Any]:
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        for part in value.values():
            yield from _find(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _find(part, key)


class ProgramDocument:
    """A checked program: ``state`` and ``constants`` (name → tensor, parameter, kept), and the graph. Raises CorruptCheckpointError."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        try:
            top = parse_object(data)
        except NotJSON as refusal:
            self._bad(refusal.wanted, refusal.found)
        if top.get("format") != FORMAT:
            self._bad(f"a document of format {FORMAT} expected", f"it is {glimpse(top.get('format'))}")
        if top.get("requires") != []:
            raise IncompatibleCheckpointError(
                f"cannot load {where}: it requires {glimpse(top.get('requires'))}, which this version of shardsave does not know; "
                f"the checkpoint is intact, load it with a newer version"
            )
        self.state = self._places(top.get("state"), "state")
        self.constants = self._places(top.get("constants"), "constants")
        self._torch = str(top.get("torch"))
        self._graph = top.get("graph")
        try:
            problem = next(_problems(self._graph), None)
        except (RecursionError, TypeError, ValueError, KeyError, AttributeError):
            problem = "a graph as torch.export writes it was expected, it is another"
        if problem is not None:
            raise CorruptCheckpointError(f"corrupt {where}: {problem}; nothing was run")

    def _bad(self, wanted: str, found: str) -> NoReturn:
        raise CorruptCheckpointError(f"corrupt {self.where}: {wanted}, {found}; nothing was run")

    def _places(self, places: Any, what: str) -> dict[str, tuple[str, bool, bool]]:
        if not isinstance(places, dict):
            self._bad(f"{what} expected to map names to tensors", f"it is {glimpse(places)}")
        made = {}
        for name, place in places.items():
            kinds = {key: type(value) for key, value in place.items()} if isinstance(place, dict) else {}
            if kinds != {"tensor": str, "parameter": bool, "kept": bool} or not _harmless_path(name):
                self._bad(f"{what} expected to map names to tensors", f"{glimpse(name)} is {glimpse(place)}")
            made[name] = (place["tensor"], place["parameter"], place["kept"])
        return made

    def module(
        self, state: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], device: torch.device | None
    ) -> nn.Module:
        """A module that runs the graph with these tensors, on ``device`` where one is given."""
        from torch._export.serde import serialize
        from torch.export.passes import move_to_device_pass

        try:
            artifact = serialize.SerializedArtifact(
                exported_program=json.dumps(self._graph).encode(),
                state_dict=dict(state),  # type: ignore[arg-type]
                constants=dict(constants),  # type: ignore[arg-type]
                example_inputs=(),  # type: ignore[arg-type]
            )
            exported = serialize.deserialize(artifact)
            if device is not None:
                exported = move_to_device_pass(exported, str(device))
            return exported.module()
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {self.where}: a program that torch {torch.__version__} reads was expected, it was saved with torch "
                f"{self._torch}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; nothing was run"
            ) from error


def _problems(value: Any, path: str = "graph", key: str = "") -> Iterator[str]:
    """What of a graph torch would evaluate, look up or make source code of, and is not of a harmless form."""
    if isinstance(value, str):
        wanted = _unless_harmless(key, value)
        if wanted:
            yield f"{path}: {wanted} was expected, it is {glimpse(value)}"
    elif isinstance(value, list):
        if key == "guards_code" and value:
            yield f"{path}: no code was expected, there is {glimpse(value)}"
        for place, part in enumerate(value):
            yield from _problems(part, f"{path}[{place}]", key)
    elif isinstance(value, dict):
        if key == "metadata" and value:
            yield f"{path}: no metadata was expected, there is {glimpse(value)}"
        if key == "treespec_namedtuple_fields" and value:
            yield f"{path}: arguments and results of plain types were expected, there is {glimpse(value)}"
        if key in _BY_SYMBOL:
            for name in value:
                if wanted := _unless_harmless("expr_str", name):
                    yield f"{path}: {wanted} was expected, it is {glimpse(name)}"
        elif key in _BY_NAME:
            for name in value:
                if wanted := _unless_harmless("name", name):
                    yield f"{path}: {wanted} was expected, it is {glimpse(name)}"
        for name, part in value.items():
            yield from _problems(part, f"{path}.{name}", name)


_BY_SYMBOL = frozenset({"range_constraints"})
_BY_NAME = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values"})
_PLAIN_STRINGS = frozenset({"as_string", "as_strings", "torch_version", "verifiers", "type"})
_PATHS = frozenset({"parameter_name", "buffer_name", "tensor_constant_name", "fqn"})


def _unless_harmless(key: str, value: str) -> str | None:
    """What was wanted under ``key``, where ``value`` is not that."""
    if key in ("target", "as_operator"):
        return None if _TARGET.fullmatch(value) else "an operator of torch"
    if key in ("expr_str", "as_expr"):
        value = _WRITTEN_SYMBOL.sub(r"\1", value)
        words = _NAME.findall(value)
        harmless = _EXPRESSION.fullmatch(value) and "__" not in value and not re.search(r"\.\s*[A-Za-z_(]", value)
        known = all(word in _FUNCTIONS or _SYMBOL.fullmatch(word) for word in words)
        return None if harmless and known and len(value) < 10_000 else "an expression over sizes"
    if key in ("in_spec", "out_spec"):
        return None if _plain_tree(json.loads(value)[1]) else "tuples, lists and dicts"
    if key in _PATHS:
        return None if value == "" or _harmless_path(value) else "the name of a tensor"
    if key in _PLAIN_STRINGS:
        return None
    harmless = value == "" or (_NAME.fullmatch(value) and not value.startswith("__") and not keyword.iskeyword(value))
    return None if harmless else "a name"


def _harmless_path(name: str) -> bool:
    return bool(_DOTTED.fullmatch(name)) and not any(part.startswith("__") for part in name.split("."))


def _plain_tree(tree: Any) -> bool:
    return tree["type"] in _CONTAINERS and all(_plain_tree(child) for child in tree["children_spec"])
