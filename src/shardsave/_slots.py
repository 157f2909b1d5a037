"""What a live module has to be filled: its tensors by every name, and the sub-modules that have a say in how they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from shardsave._state import Names


class Slot(NamedTuple):
    """One name of the module: the sub-module that owns it, its attribute there, and the tensor."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_buffer: bool


def slots(module: nn.Module) -> list[Slot]:
    """Every parameter and buffer by every name it has, in module order."""
    made = []
    names = Names(module)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        start = _start(names.plain(f"{prefix}."))
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                made.append(Slot(start + attribute, owner, attribute, parameter, False))
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                made.append(Slot(start + attribute, owner, attribute, buffer, True))
    return made


def expected_names(module: nn.Module) -> set[str]:
    """The names that the module's own state dict has."""
    expected: set[str] = set()
    names = Names(module)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        start = _start(names.plain(f"{prefix}."))
        expected.update(start + name for name, value in owner._parameters.items() if value is not None)
        hidden = owner._non_persistent_buffers_set
        expected.update(start + name for name, value in owner._buffers.items() if value is not None and name not in hidden)
        if type(owner).get_extra_state is not nn.Module.get_extra_state:
            expected.add(start + "_extra_state")
    return expected


def _start(name: str) -> str:
    """How the names in a sub-module begin whose own name, with a dot behind it, is ``name``."""
    return "" if name == "." else name


def hooked_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost sub-modules that have a say in how they are loaded, and so are loaded by their own routine."""
    found: dict[str, nn.Module] = {}
    names = Names(module)
    for raw_name, owner in module.named_modules(remove_duplicate=False):
        name = _start(names.plain(f"{raw_name}.")).removesuffix(".")
        if ancestor(f"{name}.", found) is None and _has_own_loading(owner):
            found[name] = owner
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


def leaders(of: list[Slot]) -> dict[str, str]:
    """Every name → the first name with the same memory."""
    first: dict[object, str] = {}
    found = {}
    for slot in of:
        tensor = slot.tensor
        key: object = id(tensor)
        if has_memory(tensor):
            key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        found[slot.name] = first.setdefault(key, slot.name)
    return found


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether there is an address to ask for, and something at it."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    return plain and not tensor.is_meta and tensor.data_ptr() != 0
