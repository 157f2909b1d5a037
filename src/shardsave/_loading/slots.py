"""What a live module has to be filled: its tensors by every name, and the sub-modules that have loading routines of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from shardsave._common.gc_pause import collector_still
from shardsave._common.memory import address
from shardsave._state.module import EXTRA_STATE, Names, refuse_sharded, unwrap


class Slot(NamedTuple):
    """One name of a tensor: the sub-module that owns it, the attribute there, and the tensor. ``saved``: the state dict has the name."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_buffer: bool
    saved: bool


class SubModule(NamedTuple):
    """One name of a sub-module. ``start``: the beginning of the names inside it, without the names of wrappers."""

    start: str
    module: nn.Module


class Inventory(NamedTuple):
    """Everything that a load has to know about a module.

    ``leaders``: each name of a tensor → the first name with the same memory.
    """

    module: nn.Module
    sub_modules: list[SubModule]
    slots: list[Slot]
    leaders: dict[str, str]

    def again(self) -> Inventory:
        """The inventory of the same module, whose tensors may have been replaced since."""
        return _inventory(self.module)

    def with_new_tensors(self) -> Inventory:
        """The same names after tensors were replaced without a change of ties."""
        return self._replace(slots=_slots(self.sub_modules))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {slot.name: slot.tensor for slot in self.slots}

    def expected_names(self) -> set[str]:
        """The names in the module's state dict."""
        return {*(slot.name for slot in self.slots if slot.saved), *self.extra_state_names()}

    def extra_state_names(self) -> list[str]:
        """The names of extra state in the module's state dict."""
        default = nn.Module.get_extra_state
        return [start + EXTRA_STATE for start, part in self.sub_modules if type(part).get_extra_state is not default]

    def modules_with_routines(self) -> dict[str, nn.Module]:
        """The outermost sub-modules that have a loading routine of their own, by name; "" is the whole module."""
        outermost: dict[str, nn.Module] = {}
        for start, part in self.sub_modules:
            if _has_own_routine(part) and ancestor(start, outermost) is None:
                outermost[start.removesuffix(".")] = part
        return outermost


@collector_still()
def take_inventory(module: nn.Module) -> Inventory:
    """The inventory of ``module``, without its wrappers. Raises UnsupportedTensorError for a wrapper of FSDP."""
    module = unwrap(module)
    refuse_sharded(module, "fill", "the module is unchanged")
    return _inventory(module)


def _inventory(module: nn.Module) -> Inventory:
    named = list(module.named_modules(remove_duplicate=False))
    names = Names(named)
    sub_modules = [SubModule("", module), *(SubModule(names.plain(f"{name}."), part) for name, part in named[1:])]
    slots = _slots(sub_modules)
    return Inventory(module, sub_modules, slots, _leaders(slots))


def _slots(sub_modules: Iterable[SubModule]) -> list[Slot]:
    """Every parameter and buffer by every name, in module order."""
    slots = []
    for start, owner in sub_modules:
        not_saved = owner._non_persistent_buffers_set
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                slots.append(Slot(start + attribute, owner, attribute, parameter, False, True))
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                slots.append(Slot(start + attribute, owner, attribute, buffer, True, attribute not in not_saved))
    return slots


def _leaders(slots: Sequence[Slot]) -> dict[str, str]:
    first_at_address: dict[int, Slot] = {}
    first_with_memory: dict[object, str] = {}
    leaders = {}
    for slot in slots:
        tensor = slot.tensor
        first = first_at_address.setdefault(address(tensor) or id(tensor), slot)
        if first.tensor is tensor:
            leaders[slot.name] = first.name
            continue
        first_with_memory.setdefault(_memory_key(first.tensor), first.name)
        leaders[slot.name] = first_with_memory.setdefault(_memory_key(tensor), slot.name)
    return leaders


def _memory_key(tensor: torch.Tensor) -> object:
    """A value that is equal for two tensors exactly when they are the same elements in memory."""
    if not (begin := address(tensor)):
        return id(tensor)
    return begin, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def ancestor(name: str, owners: Mapping[str, object] | set[str]) -> str | None:
    """Which of ``owners``, names of sub-modules, contains ``name``; "" is the whole module."""
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


def counts_batches(slot: Slot) -> bool:
    """Whether the slot is the counter of a batch norm: as in torch, state from before it existed is accepted without it."""
    return slot.attribute == "num_batches_tracked" and isinstance(slot.owner, _NormBase)


def _has_own_routine(module: nn.Module) -> bool:
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
