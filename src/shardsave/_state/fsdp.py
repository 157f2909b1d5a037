"""Modules that torch's ``fully_shard`` (FSDP2) shards: their parameters are DTensors, but for the time in which they compute.

Recognised without an import. Its hooks on state dicts only prepare sharded parameters and note that these were replaced.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

#: Where the hooks of FSDP2 are defined, in this and earlier versions of torch.
_PACKAGES = ("torch.distributed.fsdp.", "torch.distributed._composable.fsdp.")
#: Attributes that FSDP2 sets on modules: for torch.compile, and, with random digits behind this, for its own state.
_MARKS = frozenset(["_is_fsdp_managed_module", "_fsdp_use_orig_params"])
_STATE = "__composable_api_state_key_"


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called for ``module`` itself."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def is_fsdp_hook(hook: Any) -> bool:
    """Whether ``hook``, of a module, is one of FSDP2."""
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


def attributes_without_fsdp(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The ``attributes`` of a module without those that FSDP2 has set."""
    return {name: value for name, value in attributes.items() if not (_is_mark(name) or _is_forward_method(value))}


def _is_mark(name: object) -> bool:
    return isinstance(name, str) and (name in _MARKS or name.startswith(_STATE))


def _is_forward_method(value: Any) -> bool:
    """Whether ``value`` is what ``register_fsdp_forward_method`` puts on a module, in the place of a method and under its name."""
    function = value.__func__ if type(value) is types.MethodType else None
    return type(function) is types.FunctionType and str(function.__globals__.get("__name__")).startswith(_PACKAGES)


def parameters_whole_before(module: nn.Module) -> set[tuple[int, str]]:
    """Which parameters FSDP2 has sharded that no other scheme had split before: the `id` of a sub-module, and the name there."""
    return {
        place
        for parameter in _sharded_parameters(module)
        if not getattr(parameter, "is_dtensor", True)
        for place in _places_of(parameter._module_info)
    }


def _places_of(info: Any) -> Iterator[tuple[int, str]]:
    yield id(info.module), info.param_name
    yield from zip(map(id, info.shared_modules), info.shared_param_names)


def computes_with_cpu_parameters(module: nn.Module) -> bool:
    """Whether the sharded parameters of ``module`` and its sub-modules stay on the CPU (``CPUOffloadPolicy``)."""
    return any(getattr(parameter, "offload_to_cpu", False) for parameter in _sharded_parameters(module))


def _sharded_parameters(module: nn.Module) -> Iterator[Any]:
    """What FSDP2 knows of each parameter in ``module`` and its sub-modules that it has sharded."""
    for part in module.modules():
        state = part._get_fsdp_state() if is_fsdp_module(part) else None  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from getattr(group, "fsdp_params", ())
