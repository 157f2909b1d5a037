"""A graph of torch's operators as data, and how it is run.

Nothing of a graph is evaluated, compiled or imported. A name leads to one of the functions of a table here or to an operator of torch's
dispatcher, arguments are plain values, and the graph is run by calling one operator after the other.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardsave._common.strict_json import glimpse

#: How deep values and graphs may be nested: deeper than any model's, and far from the end of Python's stack.
MAX_DEPTH = 32

_OPERATOR = re.compile(r"(aten|prims)\.(\w+)\.(\w+)", re.ASCII)

# Operators with a leading underscore are torch's own insides, many of which trust their arguments. These are what models are traced to.
_INNER = re.compile(
    r"_(?:to_copy|unsafe_view|unsafe_index|unsafe_index_put|unsafe_masked_index|softmax|log_softmax|safe_softmax|"
    r"native_batch_norm_legit\w*|batch_norm_impl_index|native_multi_head_attention|transformer_encoder_layer_fwd|"
    r"scaled_dot_product_\w+|assert_scalar|assert_async|assert_tensor_metadata|functional_sym_constrain_range\w*|"
    r"local_scalar_dense|is_all_true|is_any_true|shape_as_tensor|adaptive_avg_pool[23]d|cdist_forward|euclidean_dist|weight_norm|"
    r"embedding_bag|embedding_bag_forward_only|ctc_loss|fft_\w+|linalg_\w+|trilinear|upsample_\w+|convolution|prelu_kernel|"
    r"fused_rms_norm|grouped_mm|scaled_mm|int_mm|weight_int4pack_mm\w*|weight_int8pack_mm|conj|conj_physical|neg_view|aminmax|unique2|"
    r"pack_padded_sequence|pad_packed_sequence|pad_circular|pad_enum|"
    r"_and__|_or__|_xor__|_lshift__|_rshift__|_iand__|_ior__|_ixor__)",
    re.ASCII,
)
# These reach for files, for other memory than their tensors', for one library's insides, or believe sizes that others computed; and of a
# tensor that is not strided the places of its elements are data, which no operator checks again.
_OUTER = re.compile(
    r"from_file|save|set|set_|set_data|record_stream|resize\w*|segment_reduce|(?:cudnn|miopen|mkldnn|fbgemm|mps|quantized|q)_\w+|"
    r"\w*(?:backward|sparse|mkldnn|quantize|qparams|fused_moving)\w*|coalesce|(?:(?:crow|col|ccol|row)_)?indices\w*|values\w*|"
    r"hspmm|s?smm|sspaddmm",
    re.ASCII,
)


def _set_grad_enabled(enabled: bool, graph: Callable[..., Any], *operands: Any) -> Any:
    with torch.set_grad_enabled(enabled):
        return graph(*operands)


def _autocast(
    device: torch.device,
    dtype: torch.dtype | None,
    enabled: bool,
    cache: bool | None,
    graph: Callable[..., Any],
    *operands: Any,
) -> Any:
    with torch.autocast(device.type, dtype, enabled, cache):
        return graph(*operands)


def _cond(predicate: Any, true: Callable[..., Any], false: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return true(*operands) if predicate else false(*operands)


def _while_loop(
    condition: Callable[..., Any], body: Callable[..., Any], carried: Sequence[Any], others: Sequence[Any] = ()
) -> Any:
    while condition(*carried, *others):
        carried = body(*carried, *others)
    return carried


def _map(body: Callable[..., Any], over: Sequence[torch.Tensor], others: Sequence[Any]) -> Any:
    rows = [body(*(tensor[n] for tensor in over), *others) for n in range(len(over[0]))]
    return tuple(torch.stack(column) for column in zip(*rows))


def _scan(combine: Callable[..., Any], carried: Sequence[Any], over: Sequence[torch.Tensor], others: Sequence[Any] = ()) -> Any:
    rows = []
    for n in range(len(over[0])):
        made = combine(*carried, *(tensor[n] for tensor in over), *others)
        carried = made[: len(carried)]
        rows.append(made[len(carried) :])
    return (*carried, *(torch.stack(column) for column in zip(*rows)))


#: What a graph may call beside operators of the dispatcher: arithmetic on sizes, and operators whose arguments are graphs.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"python.{name}": getattr(operator, name) for name in (
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "le", "lshift", "lt", "mod", "mul", "ne", "neg", "not_", "or_",
        "pos", "pow", "rshift", "sub", "truediv", "truth", "xor",
    )},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "_sym_sqrt",
    ) if hasattr(torch, name)},
    "higher_order.wrap_with_set_grad_enabled": _set_grad_enabled,
    "higher_order.wrap_with_autocast": _autocast,
    "higher_order.cond": _cond,
    "higher_order.while_loop": _while_loop,
    "higher_order.map_impl": _map,
    "higher_order.scan": _scan,
}  # fmt: skip


def _named(kind: type, except_for: str) -> dict[str, Any]:
    """torch's dtypes or memory formats by their names."""
    names = {str(thing).removeprefix("torch."): thing for thing in vars(torch).values() if isinstance(thing, kind)}
    return {name: thing for name, thing in names.items() if not re.fullmatch(except_for, name)}


#: dtypes by their names, without those of quantized tensors, and of tensors of which torch knows the name alone.
DTYPES = _named(torch.dtype, r"q\w+|bits\w+|u?int[1-7]")
_NAMED = {"dtype": DTYPES, "layout": {"strided": torch.strided}, "memory_format": _named(torch.memory_format, "")}

# Where torch wants one of these it takes a number or a string too, and numbers unchecked.
_KINDS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format, "Device": torch.device}
_DEVICE = re.compile(r"[a-z]+(?::\d{1,3})?", re.ASCII)
FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Value:
    """A value of a graph by its place: first come the inputs, then what its calls gave, in order."""

    place: int


class Bad(Exception):
    """Where a document goes astray: what was wanted there, and a glimpse of what was found."""

    def __init__(self, where: str, wanted: str, found: Any) -> None:
        super().__init__(where, wanted, found)
        self.where, self.wanted, self.found = where, wanted, glimpse(found)


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: list[Any]
    keywords: dict[str, Any]
    last_uses: tuple[int, ...]


class Graph:
    """Calls in order. ``inputs``: how many values it is given; ``result``: a value, or a nest of values, of the graph."""

    def __init__(self, inputs: int, calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]], result: Any) -> None:
        self.inputs = inputs
        self.result = result
        # Memory is let go of at the last use, as it is where Python runs a forward.
        last: dict[int, int] = {}
        for place, (_, arguments, keywords) in enumerate(calls):
            last[inputs + place] = place
            last.update((value, place) for value in _values([arguments, keywords]))
        for value in _values(result):
            last.pop(value, None)
        ends: dict[int, list[int]] = {}
        for value, place in last.items():
            ends.setdefault(place, []).append(value)
        self._calls = [_Call(*call, tuple(ends.get(place, ()))) for place, call in enumerate(calls)]

    def __call__(self, *given: Any) -> Any:
        if len(given) != self.inputs:
            raise TypeError(f"a graph of {self.inputs} values was called with {len(given)}")
        values: list[Any] = list(given)
        for function, arguments, keywords, last_uses in self._calls:
            values.append(function(*_filled(arguments, values), **_filled(keywords, values)))
            for value in last_uses:
                values[value] = None
        return _filled(self.result, values)


def _values(nest: Any) -> list[int]:
    if isinstance(nest, Value):
        return [nest.place]
    parts: Any = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, (list, tuple)) else ()
    return [value for part in parts for value in _values(part)]


def _filled(nest: Any, values: Sequence[Any]) -> Any:
    kind = type(nest)
    if kind is Value:
        return values[nest.place]
    if kind is list:
        return [_filled(part, values) for part in nest]
    if kind is tuple:
        return tuple(_filled(part, values) for part in nest)
    if kind is dict:
        return {name: _filled(part, values) for name, part in nest.items()}
    return nest


class Reader:
    """Makes graphs of a document's lists, with ``device`` in the place of every device that they name. Raises Bad."""

    def __init__(self, graphs: Any, device: torch.device) -> None:
        if not isinstance(graphs, list) or not graphs:
            raise Bad("graphs", "a list of graphs", graphs)
        self._documents = graphs
        self._device = device
        self._made: dict[int, Graph] = {}

    def graph(self, number: int) -> Graph:
        # The last first: a graph calls only later ones, so there is no cycle, and nothing is nested deeper than the list is long.
        for later in range(len(self._documents) - 1, number - 1, -1):
            if later not in self._made:
                self._made[later] = self._read(later)
        return self._made[number]

    def _read(self, number: int) -> Graph:
        where, document = f"graphs[{number}]", self._documents[number]
        if not isinstance(document, dict) or document.keys() != {"inputs", "calls", "result"}:
            raise Bad(where, "inputs, calls and a result", document)
        inputs, listed = document["inputs"], document["calls"]
        if type(inputs) is not int or inputs < 0 or not isinstance(listed, list):
            raise Bad(where, "a number of inputs and a list of calls", document)
        calls = []
        for place, call in enumerate(listed):
            here, known = f"{where}.calls[{place}]", inputs + place
            if not isinstance(call, list) or len(call) != 3 or not isinstance(call[1], list) or not isinstance(call[2], dict):
                raise Bad(here, "a function, its arguments and its keywords", call)
            function = _function(call[0], here)
            arguments = [self._value(part, known, number, here) for part in call[1]]
            keywords = self._named(call[2], known, number, here)
            _check_kinds(function, arguments, keywords, here)
            calls.append((function, arguments, keywords))
        return Graph(inputs, calls, self._value(document["result"], inputs + len(calls), number, f"{where}.result"))

    def _named(self, parts: Mapping[str, Any], known: int, number: int, where: str, depth: int = 0) -> dict[str, Any]:
        return {name: self._value(part, known, number, where, depth) for name, part in parts.items()}

    def _value(self, value: Any, known: int, number: int, where: str, depth: int = 0) -> Any:
        """A scalar, a list, or what an object with one tag stands for; ``known``: how many values of the graph there are so far."""
        if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
            return value
        if depth > MAX_DEPTH:
            raise Bad(where, f"values nested at most {MAX_DEPTH} deep", value)
        if isinstance(value, list):
            return [self._value(part, known, number, where, depth + 1) for part in value]
        tag, inner = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)
        if tag == "value" and type(inner) is int and 0 <= inner < known:
            return Value(inner)
        if tag == "graph" and type(inner) is int and number < inner < len(self._documents):
            return self._made[inner]
        if tag == "tuple" and isinstance(inner, list):
            return tuple(self._value(part, known, number, where, depth + 1) for part in inner)
        if tag == "dict" and isinstance(inner, dict):
            return self._named(inner, known, number, where, depth + 1)
        if tag == "device" and isinstance(inner, str) and _DEVICE.fullmatch(inner):
            return self._device
        if tag == "float" and isinstance(inner, str) and inner in FLOATS:
            return FLOATS[inner]
        if tag == "complex" and isinstance(inner, list) and len(inner) == 2:
            real, imaginary = (self._value(part, known, number, where, depth + 1) for part in inner)
            if type(real) is float and type(imaginary) is float:
                return complex(real, imaginary)
        if tag in _NAMED and isinstance(inner, str):
            if inner not in _NAMED[tag]:
                raise Bad(where, f"a {tag} of torch {torch.__version__}", inner)
            return _NAMED[tag][inner]
        raise Bad(where, "a value of the graph or a plain one", value)


def _function(name: Any, where: str) -> Callable[..., Any]:
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if parts is None or _OUTER.fullmatch(parts[2]) or (parts[2][0] == "_" and not _INNER.fullmatch(parts[2])):
        raise Bad(where, "an operator of torch that computes", name)
    namespace, short, overload = parts.groups()
    if namespace == "prims":
        importlib.import_module("torch._prims")  # registers them
    found = None
    if _has_kernel(f"{namespace}::{short}" + (f".{overload}" if overload != "default" else "")):
        packet = getattr(getattr(torch.ops, namespace), short, None)
        found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload):
        raise Bad(where, f"an operator of torch {torch.__version__}", name)
    return found


def _check_kinds(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any], where: str) -> None:
    """A dtype, a layout, a memory format or a device must be written as one, in the document: not as a number, nor as another's result."""
    schema = function._schema.arguments if isinstance(function, torch._ops.OpOverload) else ()
    for place, wanted in enumerate(schema):
        kind = _KINDS.get(str(wanted.real_type).removeprefix("Optional[").removesuffix("]"))
        if kind is None:
            continue
        value = arguments[place] if place < len(arguments) else keywords.get(wanted.name)
        if value is not None and type(value) is not kind:
            raise Bad(where, f"a {kind.__name__} for {wanted.name}", value)


def _has_kernel(name: str) -> bool:
    """Whether the dispatcher has the operator: functions that TorchScript alone has, some of which touch files, are not there."""
    try:
        return torch._C._dispatch_has_kernel(name)
    except RuntimeError:  # no legal name for one
        return False
