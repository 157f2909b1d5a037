"""Modules that torch's ``fully_shard`` (FSDP2) shards: their parameters are DTensors, but for the time in which they compute.

Recognised without an import. Its hooks on state dicts only prepare sharded parameters and note that these were replaced.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

#: Where the hooks of FSDP2 are defined, in this and earlier versions of torch.
_PACKAGES = ("torch.distributed.fsdp.", "torch.distributed._composable.fsdp.")


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called for ``module`` itself."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def is_fsdp_hook(hook: Any) -> bool:
    """Whether ``hook``, of the loading of a module, is one of FSDP2."""
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith(_PACKAGES)


def reshard(module: nn.Module) -> None:
    """Puts the sharded parameters in place, in ``module`` and all its sub-modules; after a forward pass some may be whole."""
    if "torch.distributed.fsdp" in sys.modules:
        for part in module.modules():
            if is_fsdp_module(part):
                part.reshard()  # type: ignore[operator]


def parameters_replaced(module: nn.Module) -> None:
    """Tells FSDP2 that parameters of ``module`` itself were replaced, as `load_state_dict` does. It may give them other local tensors."""
    for hook in [*module._load_state_dict_post_hooks.values()]:
        if is_fsdp_hook(hook):
            hook(module, None)


def computes_with_cpu_parameters(module: nn.Module) -> bool:
    """Whether the sharded parameters of ``module`` and its sub-modules stay on the CPU (``CPUOffloadPolicy``)."""
    for part in module.modules():
        state = part._get_fsdp_state() if is_fsdp_module(part) else None  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in (one for group in groups for one in getattr(group, "fsdp_params", ())):
            if getattr(parameter, "offload_to_cpu", False):
                return True
    return False
