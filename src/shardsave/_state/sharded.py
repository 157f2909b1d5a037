"""Modules of which this process does not have all the data, because a library has sharded or freed it: refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from shardsave._common.memory import PLAIN_TYPES
from shardsave._state.distributed_tensors import is_distributed_class, read_directly
from shardsave.errors import UnsupportedTensorError

_LINEAR = ("weight", "bias")

#: Class of torch → the attributes that hold its sizes, and the names of tensors that are empty only if one of the sizes is 0.
_SIZES: Mapping[type[nn.Module], tuple[Collection[str], Collection[str]]] = {
    nn.Linear: (("in_features", "out_features"), _LINEAR),
    nn.Bilinear: (("in1_features", "in2_features", "out_features"), _LINEAR),
    nn.Embedding: (("num_embeddings", "embedding_dim"), _LINEAR),
    nn.EmbeddingBag: (("num_embeddings", "embedding_dim"), _LINEAR),
    _ConvNd: (("in_channels", "out_channels", "kernel_size"), _LINEAR),
    nn.LayerNorm: (("normalized_shape",), _LINEAR),
    nn.RMSNorm: (("normalized_shape",), _LINEAR),
    nn.GroupNorm: (("num_channels",), _LINEAR),
    _NormBase: (("num_features",), (*_LINEAR, "running_mean", "running_var", "num_batches_tracked")),
    nn.PReLU: (("num_parameters",), _LINEAR),
    nn.MultiheadAttention: (("embed_dim",), ("in_proj_weight", "in_proj_bias", "q_proj_weight", "bias_k", "bias_v")),
    nn.RNNBase: (("input_size", "hidden_size"), ()),  # it lists their names itself
    nn.RNNCellBase: (("input_size", "hidden_size"), ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
}


def refuse_sharded(named: Sequence[tuple[str, nn.Module]], verb: str, state: str, *, emptied: bool = False) -> None:
    """Refuses FSDP's older wrapper, whose `state_dict` is a collective call that hangs if one rank alone calls it, and parameters that
    ZeRO-3 has partitioned; ``emptied``: also tensors without elements of which the sizes of their module say that they have some.

    ``named``: all sub-modules by name. ``verb`` and ``state`` complete the message. Raises UnsupportedTensorError.
    """
    kinds = {type(part) for _, part in named}
    sharding = {kind for kind in kinds if any(base.__name__ == "FullyShardedDataParallel" for base in kind.__mro__)}
    if not sharding and _all_whole([part for _, part in named], emptied):
        return
    for name, part in named:
        if type(part) in sharding:
            raise UnsupportedTensorError(
                f"cannot {verb} module {name!r}: a module that is whole in this process was expected, it is a "
                f"FullyShardedDataParallel; shard it with fully_shard (FSDP2) instead, or use its full state dict; {state}"
            )
        for attribute, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or (type(tensor) not in PLAIN_TYPES and is_lazy(tensor)):
                continue
            if hasattr(tensor, "ds_status"):
                refuse_partitioned(f"{name}.{attribute}" if name else attribute, tensor, verb, state)
            if emptied and not tensor.numel():
                _refuse_if_emptied(f"{name}.{attribute}" if name else attribute, part, attribute)


def _all_whole(parts: Sequence[nn.Module], emptied: bool) -> bool:
    """Whether nothing of ``parts`` has to be looked at more closely. Each question is put to all tensors in turn, which is faster."""
    tensors = [
        tensor for part in parts for own in (part._parameters, part._buffers) for tensor in own.values() if tensor is not None
    ]
    kinds = {*map(type, tensors)}
    if not all(kind in PLAIN_TYPES or is_distributed_class(kind) for kind in kinds) or any(
        map(hasattr, tensors, repeat("ds_status"))
    ):
        return False
    with read_directly(tensors):
        return not emptied or all(tensor.numel() for tensor in tensors)


def refuse_partitioned(name: str, tensor: torch.Tensor, verb: str, state: str) -> None:
    """Refuses a parameter that DeepSpeed's ZeRO-3 has partitioned and not gathered. Its ``data`` is empty or incomplete."""
    attributes = getattr(tensor, "__dict__", {})
    if "ds_numel" not in attributes or "ds_status" not in attributes:
        return
    status = str(getattr(attributes["ds_status"], "name", attributes["ds_status"]))
    if tensor.numel() != attributes["ds_numel"] or status in ("NOT_AVAILABLE", "INFLIGHT"):
        shape = list(attributes.get("ds_shape", ()))
        raise UnsupportedTensorError(
            f"cannot {verb} {name!r}: a tensor that is whole in this process was expected, DeepSpeed's ZeRO-3 has partitioned its "
            f"{shape}; gather it with deepspeed.zero.GatheredParameters, or use engine.save_16bit_model or zero_to_fp32; {state}"
        )


def _refuse_if_emptied(name: str, module: nn.Module, attribute: str) -> None:
    """Refuses to save the empty tensor ``attribute`` of ``module``, unless one of the module's sizes is 0. ``name``: for the message."""
    kind = next((kind for kind in _SIZES if isinstance(module, kind)), None)
    if kind is None:
        return
    sizes = {size: getattr(module, size, 0) for size in _SIZES[kind][0]}
    names = getattr(module, "_flat_weights_names", _SIZES[kind][1])
    if attribute in names and all(_positive(size) for size in sizes.values()):
        words = ", ".join(f"{size}={value}" for size, value in sizes.items())
        raise UnsupportedTensorError(
            f"cannot save {name!r}: the elements of a {type(module).__name__} with {words} were expected, it has none: its data was "
            f"freed or moved; put the data back, or save the full state dict of the library that shards the model; nothing was written"
        )


def _positive(size: Any) -> bool:
    return all(_positive(part) for part in size) if isinstance(size, (tuple, list)) else isinstance(size, int) and size > 0
