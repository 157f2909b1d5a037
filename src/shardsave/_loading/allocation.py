"""Allocates the memory in which the tensors of a module will be filled: for meta tensors, and on the requested device."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._loading.memory_errors import memory_for
from shardsave._loading.slots import Inventory, Slot, counts_batches


def allocate(inventory: Inventory, filled: Collection[str], owned: Collection[str], device: torch.device | None) -> Inventory:
    """Replaces meta tensors by tensors with memory and moves tensors to ``device``; keeps ties. Returns the inventory afterwards.

    ``filled``: the names that will be filled. ``owned``: names below sub-modules that load themselves.
    """
    all_slots = inventory.slots.values()
    if device is None:
        moving = [slot for slot in all_slots if slot.tensor.is_meta]
    else:
        moving = [slot for slot in all_slots if not stays(slot.tensor, device)]
    if not moving:
        return inventory
    filled_leaders = {inventory.leader(name) for name in filled if name in inventory.slots}
    owned_leaders = {inventory.leader(name) for name in owned if name in inventory.slots}
    slots = dict(inventory.slots)
    memory: dict[str, torch.Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    # A parameter created in inference mode could never be trained, so the caller's mode must not affect the module.
    with torch.inference_mode(False), torch.no_grad():
        for slot in moving:
            tensor, leader = slot.tensor, inventory.leader(slot.name)
            if tensor.is_meta and not (leader in filled_leaders or leader in owned_leaders or counts_batches(slot)):
                continue
            if leader not in memory:
                with memory_for(slot.name, tensor.nbytes, device):
                    memory[leader] = _new_memory(tensor, device, will_be_filled=leader in filled_leaders)
            if slot.is_buffer or tensor.is_meta:
                slots[slot.name] = slot._replace(tensor=_replace(slot, memory[leader], parameters))
                continue
            tensor.data = memory[leader]
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.data.to(memory[leader].device)
    return inventory._replace(slots=slots)


def stays(tensor: torch.Tensor, device: torch.device | None) -> bool:
    """Whether ``tensor`` is filled in the memory that it has now; ``device``: the requested device, None for any."""
    return not tensor.is_meta and (device is None or is_lazy(tensor) or _same_device(tensor.device, device))


def _new_memory(tensor: torch.Tensor, device: torch.device | None, *, will_be_filled: bool) -> torch.Tensor:
    target = device or torch.device("cpu")
    if will_be_filled:
        return torch.empty_like(tensor.detach(), device=target)
    return torch.zeros_like(tensor, device=target) if tensor.is_meta else tensor.detach().to(target)


def _replace(slot: Slot, memory: torch.Tensor, parameters: dict[int, nn.Parameter]) -> torch.Tensor:
    """Puts ``memory`` in the place of a buffer or a meta parameter, with the Python attributes of the old tensor; returns the new tensor.

    ``parameters``: id of an old parameter → its replacement, so that all names of a tied parameter get the same object.
    """
    if slot.is_buffer:
        memory.__dict__.update(slot.tensor.__dict__)
        slot.owner._buffers[slot.attribute] = memory
        return memory
    if id(slot.tensor) not in parameters:
        parameter = nn.Parameter(memory, requires_grad=slot.tensor.requires_grad)
        parameter.__dict__.update(slot.tensor.__dict__)
        parameters[id(slot.tensor)] = parameter
    slot.owner._parameters[slot.attribute] = parameters[id(slot.tensor)]
    return parameters[id(slot.tensor)]


def _same_device(left: torch.device, right: torch.device) -> bool:
    if left.type != right.type or left.type == "cpu":
        return left.type == right.type
    if right.index is None and left.type == "cuda":
        return left.index == torch.cuda.current_device()
    return left.index == right.index or right.index is None
