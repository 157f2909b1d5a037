"""Which operators and functions a program may call.

A program may name a function in ``FUNCTIONS``, or an operator in torch's dispatcher that only computes. The name is only looked up: nothing
is evaluated, and nothing that a program names is imported.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardsave._program.refusals import BadProgram

_OPERATOR = re.compile(r"(aten|prims)\.(\w+)\.(\w+)", re.ASCII)

# Operators with a leading underscore are internals of torch, and many of them trust their arguments. Only those that occur in traced models
# are allowed.
_ALLOWED_INTERNALS = re.compile(
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
# These are refused: they open files, reach memory that is not of their tensors, are internals of one library, or trust sizes that another
# operator computed. Sparse tensors are refused because the positions of their elements are data, which no operator checks again.
_REFUSED = re.compile(
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


def _cond(predicate: Any, if_true: Callable[..., Any], if_false: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return if_true(*operands) if predicate else if_false(*operands)


def _while_loop(
    condition: Callable[..., Any], body: Callable[..., Any], carried: Sequence[Any], constants: Sequence[Any] = ()
) -> Any:
    while condition(*carried, *constants):
        carried = body(*carried, *constants)
    return carried


def _map(body: Callable[..., Any], tensors: Sequence[torch.Tensor], constants: Sequence[Any]) -> Any:
    rows = [body(*(tensor[n] for tensor in tensors), *constants) for n in range(len(tensors[0]))]
    return tuple(torch.stack(column) for column in zip(*rows))


def _scan(
    combine: Callable[..., Any], carried: Sequence[Any], tensors: Sequence[torch.Tensor], constants: Sequence[Any] = ()
) -> Any:
    rows = []
    for n in range(len(tensors[0])):
        results = combine(*carried, *(tensor[n] for tensor in tensors), *constants)
        carried = results[: len(carried)]
        rows.append(results[len(carried) :])
    return (*carried, *(torch.stack(column) for column in zip(*rows)))


#: Functions that a graph may call beside operators of the dispatcher: arithmetic on sizes, and control flow with graphs as arguments.
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

# For an argument of one of these types torch also accepts a number or a string, and does not check the number.
_ARGUMENT_TYPES = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}


def find_function(name: Any, where: str) -> Callable[..., Any]:
    """The function or operator ``name``. Raises BadProgram if a program may not call it, or if this torch does not have it."""
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
    if parts is None or _REFUSED.fullmatch(parts[2]) or (parts[2][0] == "_" and not _ALLOWED_INTERNALS.fullmatch(parts[2])):
        raise BadProgram(where, "an operator of torch that computes", name)
    namespace, short, overload = parts.groups()
    if namespace == "prims":
        importlib.import_module("torch._prims")  # registers these operators
    function = None
    if _has_kernel(f"{namespace}::{short}" + (f".{overload}" if overload != "default" else "")):
        packet = getattr(getattr(torch.ops, namespace), short, None)
        function = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(function, torch._ops.OpOverload):
        raise BadProgram(where, f"an operator of torch {torch.__version__}", name)
    return function


def check_arguments(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any], where: str) -> None:
    """Refuses a dtype, layout, memory format or device that the document writes as a number, or takes from another call's result."""
    schema = function._schema.arguments if isinstance(function, torch._ops.OpOverload) else ()
    for place, argument in enumerate(schema):
        kind = _ARGUMENT_TYPES.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
        if kind is None:
            continue
        value = arguments[place] if place < len(arguments) else keywords.get(argument.name)
        if value is not None and type(value) is not kind:
            raise BadProgram(where, f"a torch.{kind.__name__} as argument {argument.name}", value)


def _has_kernel(name: str) -> bool:
    """Whether the dispatcher has the operator. Functions that only TorchScript has are not in it; some of them open files."""
    try:
        return torch._C._dispatch_has_kernel(name)
    except RuntimeError:  # the name is not a legal one
        return False
