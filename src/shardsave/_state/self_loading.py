"""Which modules have a loading routine of their own, so that their tensors cannot simply be filled."""

from __future__ import annotations

from torch import nn

from shardsave._state.wrappers import ACTIVATION, wrapped_attribute


def loads_itself(module: nn.Module) -> bool:
    """Whether ``module`` or one of its sub-modules has a loading routine of its own."""
    return any(has_own_routine(part) for part in module.modules())


def has_own_routine(module: nn.Module) -> bool:
    """Whether ``module`` itself overrides loading: hooks, overrides, extra state."""
    if wrapped_attribute(module) == ACTIVATION:  # its hook only adds its attribute to names
        return False
    kind = type(module)
    overridden = kind._load_from_state_dict is not nn.Module._load_from_state_dict and not _only_accepts_old_versions(kind)
    return bool(
        overridden
        or {"load_state_dict", "_load_from_state_dict"} & module.__dict__.keys()  # set on this one instance
        or kind.load_state_dict is not nn.Module.load_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
        or kind.set_extra_state is not nn.Module.set_extra_state
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def _only_accepts_old_versions(kind: type[nn.Module]) -> bool:
    """torch's batch norms override loading only to accept state from before ``num_batches_tracked`` existed."""
    defining = next(base for base in kind.__mro__ if "_load_from_state_dict" in base.__dict__)
    return defining.__module__ == "torch.nn.modules.batchnorm"
