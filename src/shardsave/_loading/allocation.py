"""Allocates the memory in which the tensors of a module will be filled: for meta tensors, and on the requested device."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._common.memory_errors import memory_for
from shardsave._loading.slots import Inventory, Slot, counts_batches, with_part
from shardsave._state.fsdp import computes_with_cpu_parameters, parameters_replaced


def allocate(inventory: Inventory, filled: Collection[str], owned: Collection[str], device: torch.device | None) -> Inventory:
    """Replaces meta tensors by tensors with memory and moves tensors to ``device``; keeps ties. Returns the inventory afterwards.

    ``filled``: the names that will be filled. ``owned``: names below sub-modules that load themselves.
    """
    moving = _moving(inventory, filled, owned, device)
    if not moving:
        return inventory
    filled_leaders = {inventory.leader(name) for name in filled if name in inventory.slots}
    slots = dict(inventory.slots)
    devices = _Devices(inventory, device)
    memory: dict[str, torch.Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    # A parameter created in inference mode could never be trained, so the caller's mode must not affect the module.
    with torch.inference_mode(False), torch.no_grad():
        for slot in moving:
            tensor, leader = slot.tensor, inventory.leader(slot.name)
            if leader not in memory:
                with memory_for(slot.name, slot.memory.nbytes, device):
                    target = devices.of(slot)
                    memory[leader] = _new_memory(tensor, target, will_be_filled=leader in filled_leaders)
            if slot.is_buffer or slot.memory.is_meta:
                slots[slot.name] = slot.with_memory(_replace(slot, memory[leader], parameters))
                continue
            tensor.data = memory[leader]
            slots[slot.name] = slot.with_memory(tensor)
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.data.to(memory[leader].device)
        if inventory.parts is not None:
            for owner in {id(slot.owner): slot.owner for slot in moving if slot.part is not None}.values():
                parameters_replaced(owner)
            slots.update((s.name, with_part(slots[s.name], inventory.parts, "")) for s in moving if s.part is not None)
    return inventory._replace(slots=slots)


class _Devices:
    """Where new memory goes: to ``device``, if one was requested. Meta tensors of a distributed module go where its ranks compute, but
    for sharded parameters that stay on the CPU (FSDP2's offload); other meta tensors to the CPU."""

    def __init__(self, inventory: Inventory, device: torch.device | None) -> None:
        meshes = (getattr(s.tensor, "device_mesh", None) for s in inventory.slots.values() if s.part is not None)
        kind = next((mesh.device_type for mesh in meshes if mesh is not None), "cpu")
        self._computing = device or torch.device(kind)
        on_cpu = device is None and kind != "cpu" and computes_with_cpu_parameters(inventory.module)
        self._parameters = torch.device("cpu") if on_cpu else self._computing

    def of(self, slot: Slot) -> torch.device:
        return self._parameters if slot.part is not None and not slot.is_buffer else self._computing


def host_bytes(inventory: Inventory, filled: Collection[str], owned: Collection[str], device: torch.device | None) -> int:
    """How many bytes of memory on the CPU `allocate` will take."""
    if device is not None and device.type != "cpu":
        return 0
    moving = _moving(inventory, filled, owned, device)
    return sum({inventory.leader(slot.name): slot.memory.nbytes for slot in moving}.values())


def _moving(inventory: Inventory, filled: Collection[str], owned: Collection[str], device: torch.device | None) -> list[Slot]:
    """The slots whose tensors get other memory; of those on the meta device only those that something will fill."""
    slots = inventory.slots.values()
    if device is None:
        moving = [slot for slot in slots if not slot.address and slot.memory.is_meta]
    else:
        moving = [slot for slot in slots if not stays(slot.memory, device)]
    if not moving:
        return moving
    filled_leaders = {inventory.leader(name) for name in (*filled, *owned) if name in inventory.slots}
    return [s for s in moving if not s.memory.is_meta or inventory.leader(s.name) in filled_leaders or counts_batches(s)]


def stays(tensor: torch.Tensor, device: torch.device | None) -> bool:
    """Whether ``tensor`` is filled in the memory that it has now; ``device``: the requested device, None for any."""
    return not tensor.is_meta and (device is None or is_lazy(tensor) or _same_device(tensor.device, device))


def _new_memory(tensor: torch.Tensor, target: torch.device, *, will_be_filled: bool) -> torch.Tensor:
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
