"""What a live module has to be filled: its tensors by every name, and the sub-modules that have a say in how they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from shardsave._common.memory import address, shared_names
from shardsave._state.module import EXTRA_STATE
from shardsave._state.wrappers import Names


class Slot(NamedTuple):
    """One name of the module: the sub-module that owns it, its attribute there, and the tensor; ``saved``: the state dict has it."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_buffer: bool
    saved: bool


class SubModule(NamedTuple):
    """One name of a sub-module: how the names of what is in it begin, without those of wrappers, and the sub-module."""

    start: str
    module: nn.Module


def sub_modules(module: nn.Module) -> list[SubModule]:
    """Every sub-module by every name it has, in module order; the first is the whole."""
    found = list(module.named_modules(remove_duplicate=False))
    names = Names(found)
    return [SubModule("", module), *(SubModule(names.plain(f"{name}."), part) for name, part in found[1:])]


def slots(of: Sequence[SubModule]) -> list[Slot]:
    """Every parameter and buffer by every name it has, in module order."""
    made = []
    for start, owner in of:
        hidden = owner._non_persistent_buffers_set
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                made.append(Slot(start + attribute, owner, attribute, parameter, False, True))
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                made.append(Slot(start + attribute, owner, attribute, buffer, True, attribute not in hidden))
    return made


def expected_names(of: Sequence[SubModule], all_slots: Sequence[Slot]) -> set[str]:
    """The names that the state dict of a module has."""
    return {*(slot.name for slot in all_slots if slot.saved), *extra_state_names(of)}


def extra_state_names(of: Iterable[SubModule]) -> list[str]:
    """Those of them that are extra state."""
    return [start + EXTRA_STATE for start, part in of if type(part).get_extra_state is not nn.Module.get_extra_state]


def hooked_modules(of: Iterable[SubModule]) -> dict[str, nn.Module]:
    """The outermost sub-modules that have a say in how they are loaded, and so are loaded by their own routine."""
    found: dict[str, nn.Module] = {}
    for start, part in of:
        if _has_own_loading(part) and ancestor(start, found) is None:
            found[start.removesuffix(".")] = part
    return found


def ancestor(name: str, owners: Mapping[str, object] | set[str]) -> str | None:
    """Which of ``owners``, names of sub-modules, ``name`` is below; "" is the whole module."""
    if not owners:
        return None
    if "" in owners:
        return ""
    end = name.find(".")
    while end >= 0:
        if name[:end] in owners:
            return name[:end]
        end = name.find(".", end + 1)
    return None


def _has_own_loading(module: nn.Module) -> bool:
    kind = type(module)
    overridden = kind._load_from_state_dict is not nn.Module._load_from_state_dict and not _only_versions(kind)
    return bool(
        overridden
        or {"load_state_dict", "_load_from_state_dict"} & module.__dict__.keys()  # of this one instance
        or kind.load_state_dict is not nn.Module.load_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
        or kind.set_extra_state is not nn.Module.set_extra_state
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


def _only_versions(kind: type[nn.Module]) -> bool:
    """torch's batch norms override loading only to accept state from before ``num_batches_tracked`` existed."""
    defining = next(base for base in kind.__mro__ if "_load_from_state_dict" in base.__dict__)
    return defining.__module__ == "torch.nn.modules.batchnorm"


def counts_batches(slot: Slot) -> bool:
    """A batch norm's counter: state from before torch had it is taken all the same, as torch does."""
    return slot.attribute == "num_batches_tracked" and isinstance(slot.owner, _NormBase)


def leaders(of: Sequence[Slot]) -> dict[str, str]:
    """Every name → the first name with the same memory."""
    named = {slot.name: slot.tensor for slot in of}
    shared = shared_names(named, [address(tensor) or id(tensor) for tensor in named.values()])
    return {**dict(zip(named, named)), **shared}
