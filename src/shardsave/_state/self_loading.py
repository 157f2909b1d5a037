"""Which modules have a loading routine of their own, so that their tensors cannot simply be filled."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shardsave._state.fsdp import is_fsdp_hook
from shardsave._state.wrappers import ACTIVATION, wrapped_attribute


def loads_itself(module: nn.Module) -> bool:
    """Whether ``module`` or one of its sub-modules has a loading routine of its own."""
    return any(own_routines(module.modules()))


def own_routines(modules: Iterable[nn.Module]) -> list[bool]:
    """For each of ``modules``, whether it overrides loading itself: hooks, overrides, extra state. Each class is asked once."""
    modules = list(modules)
    overriding = {kind for kind in {type(module) for module in modules} if _overrides_loading(kind)}
    return [
        (type(module) in overriding or _has_hooks(module))
        and wrapped_attribute(module) != ACTIVATION  # the hook of such a wrapper only adds its attribute to names
        for module in modules
    ]


def _overrides_loading(kind: type[nn.Module]) -> bool:
    overridden = kind._load_from_state_dict is not nn.Module._load_from_state_dict and not _only_accepts_old_versions(kind)
    return (
        overridden
        or kind.load_state_dict is not nn.Module.load_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
        or kind.set_extra_state is not nn.Module.set_extra_state
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether this one module has hooks, or a routine in the place of its class's."""
    hooks = (*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values())
    return bool(
        (hooks and not all(map(is_fsdp_hook, hooks)))
        or "load_state_dict" in module.__dict__
        or "_load_from_state_dict" in module.__dict__
    )


def _only_accepts_old_versions(kind: type[nn.Module]) -> bool:
    """torch's batch norms override loading only to accept state from before ``num_batches_tracked`` existed."""
    defining = next(base for base in kind.__mro__ if "_load_from_state_dict" in base.__dict__)
    return defining.__module__ == "torch.nn.modules.batchnorm"
