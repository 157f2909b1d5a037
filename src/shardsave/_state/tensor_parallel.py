"""Modules that more than ``fully_shard`` has distributed, as tensor parallelism does: their code no longer computes with whole tensors."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from shardsave._state.distributed_tensors import is_distributed
from shardsave._state.fsdp import parameters_whole_before
from shardsave._state.wrappers import plain_class

#: Where the hooks are defined by which ``parallelize_module`` and ``distribute_module`` of torch change what a module takes and returns.
_PACKAGE = "torch.distributed.tensor."
#: The attribute by which ``distribute_module`` marks a module.
_MARK = "_distribute_module_applied"


def place_of_tensor_parallelism(module: nn.Module) -> str | None:
    """The name of a tensor or sub-module that something else than ``fully_shard`` has distributed; None if there is none."""
    whole_before = parameters_whole_before(module)
    for path, part in module.named_modules():
        for name, tensor in chain(part._parameters.items(), part._buffers.items()):
            if tensor is not None and is_distributed(tensor) and (id(part), name) not in whole_before:
                return f"{path}.{name}" if path else name
        hooks = chain(part._forward_pre_hooks.values(), part._forward_hooks.values())
        if _MARK in vars(part) or any(map(_is_of_package, hooks)):
            return path or plain_class(type(part)).__name__
    return None


def _is_of_package(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_PACKAGE)
