"""Refuses, by name, every tensor that a load cannot fill, before any tensor of the module is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch.nn.parameter import is_lazy

from shardsave._common.memory import PLAIN_TYPES, lacks_memory, reach
from shardsave._common.processes import several_processes
from shardsave._common.words import an
from shardsave._loading.allocation import stays
from shardsave._loading.module_plan import Dtypes, ModulePlan
from shardsave._loading.overlaps import agree, overlaps
from shardsave._loading.quantised_checks import check_quantised
from shardsave._loading.slots import Inventory, Slot
from shardsave._loading.stored_bytes import same_bytes
from shardsave._state.distributed_tensors import is_distributed
from shardsave._state.offload import Offloaded
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Checkpoint
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError


def check_differences(
    inventory: Inventory, plan: ModulePlan, strict: bool, where: str, prefix: str | None, *, alone: bool
) -> None:
    """Refuses tensors of a kind that no load can fill, and, if ``strict``, every difference between module and checkpoint, all listed.

    ``where``: the path of the checkpoint, for messages. ``prefix``: the one that the caller passed; None if no caller can pass one.
    ``alone``: no other process loads, so what this module does not have is nowhere. Otherwise see `check_unexpected`.
    """
    for name in inventory.slots if plan.owned else ():
        if name in plan.owned and (inventory.slots[name].saved or name in plan.stored):
            if (whole := inventory.slots[name].whole) is not None:
                _refuse(
                    name,
                    where,
                    "a plain tensor was expected",
                    f"it is a part of {an(type(whole).__name__)}, in a module that loads itself",
                )
            _check_plain(inventory.slots[name], where)
            _check_memory(inventory.slots[name], where)
    check_shapes(inventory, plan, where)
    if strict and (plan.missing or plan.mismatched or (alone and plan.unexpected)):
        _refuse_differences(plan, where, prefix, alone=alone)


def check_unexpected(plan: ModulePlan, where: str, prefix: str | None) -> None:
    """Refuses stored tensors for which no process has a place. ``where``, ``prefix``: as in `check_differences`."""
    if plan.unexpected:
        _refuse_differences(plan, where, prefix, alone=False)


def check_shapes(inventory: Inventory, plan: ModulePlan, where: str) -> None:
    """Refuses lazy parameters, which have no shape yet, except those of a routine, which may give them one."""
    for name, slot in inventory.slots.items():
        if type(slot.tensor) not in PLAIN_TYPES and is_lazy(slot.tensor) and name in plan.matched:
            _refuse(name, where, "a parameter with a shape was expected", "it is lazy; run a forward pass first")


def check_destinations(
    inventory: Inventory, plan: ModulePlan, device: torch.device | None, checkpoint: Checkpoint
) -> frozenset[str]:
    """Refuses memory that cannot be filled in place, and tensors with the same memory, or a part of it, whose stored values differ there.

    Returns the names of tensors that share a part of their memory with others and must be read after those, one at a time.
    """
    where = checkpoint.path
    slots = inventory.slots
    filled, reaches = [], []  # the tensors that are filled where they are now, without empty ones
    check_quantised(inventory, plan, device, checkpoint)
    for name, slot in slots.items():
        if slot.offloaded is not None and (name in plan.owned or name in plan.matched or name in plan.mismatched):
            _check_offloaded(slot, slot.offloaded, device, where)
        if name in plan.matched:
            reached = _check_fillable(slot, plan.differing.get(name), device, where)
            if reached and name in plan.destinations and (device is None or stays(slot.memory, device)):
                filled.append(slot)
                reaches.append(reached)
    for one, other in plan.must_equal:
        if not same_bytes(checkpoint, plan.stored[one], plan.stored[other]) and _keep_values(inventory, plan, (one, other)):
            raise IncompatibleCheckpointError(
                f"cannot load {where}: {one!r} and {other!r} are one tensor in the module and were expected to be equal on "
                f"disk, they differ; the module is unchanged"
            )
    owners = {name: owner for name, owner in plan.destinations.items() if owner is not None}
    for name in owners:
        slot = slots[name]
        if slot.address and stays(slot.memory, device):
            filled.append(slot)
            reaches.append(reach(slot.memory))
    apart = set()
    for left, right in overlaps(filled, reaches, owners):
        both = [(plan.stored[slot.name], slot.tensor) for slot in (left, right)]
        parted = left.part is not None or right.part is not None
        if parted or left.name in owners or right.name in owners or not agree(checkpoint, both[0], both[1]):
            actual = f"it shares a part of it with {left.name!r} and not the values on disk; call .clone() on one of them first"
            _refuse(right.name, where, "memory of its own was expected", actual)
        apart.add(right.name)
    return frozenset(apart)


def check_meta_buffers(inventory: Inventory, where: str) -> None:
    """Refuses buffers on the meta device that are not saved: nothing would fill them."""
    buffers = (name for name, slot in inventory.slots.items() if slot.is_buffer and slot.memory.is_meta)
    unfilled = [name for name in buffers if name not in inventory.expected]
    if unfilled:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: buffers with data were expected, these are not saved and on the meta device: {', '.join(unfilled)}; "
            f"give them values first (to_empty gives only memory); the module is unchanged"
        )


def _refuse_differences(plan: ModulePlan, where: str, prefix: str | None, *, alone: bool) -> NoReturn:
    differences = (
        ("missing from the checkpoint", plan.missing),
        ("not in the module", plan.unexpected),
        ("mismatched", sorted(plan.mismatched.values())),
    )
    parts = [f"{len(names)} {words}: {', '.join(names)}" for words, names in differences if names]
    hint = ""
    if (found := _only_one_is_quantised(plan)) is not None:
        hint = f"; {found}"
    elif any(name.startswith(".") for name in plan.unexpected):
        hint = "; a name begins with a dot, because the prefix does not end with one: pass a prefix such as 'encoder.'"
    elif prefix is not None and (begin := _common_prefix(plan)) is not None:
        hint = f"; prefix={prefix + begin!r} loads the names that begin with it"
    elif plan.mismatched:
        hint = "; strict=False loads what fits and reports the rest"
    elif plan.left_out:
        left_out = f"{len(plan.left_out)} of the missing names were frozen and left out by the save"
        hint = f"; {left_out}: load these first, then this with strict=False"
    elif alone and not plan.missing and several_processes():
        hint = "; if other ranks hold these, load with a process_group= that has all of them"
    raise IncompatibleCheckpointError(
        f"cannot load {where}: the module's names and shapes were expected, there are {'; '.join(parts)}{hint}; the module is unchanged"
    )


def _only_one_is_quantised(plan: ModulePlan) -> str | None:
    on_disk, in_module = (any(name.endswith("_qdata") for name in names) for names in (plan.unexpected, plan.missing))
    if on_disk == in_module:
        return None
    if on_disk:
        return "the checkpoint has quantised weights: quantise the module in the same way first, as torchao's quantize_ does"
    return "the module has quantised weights, the checkpoint has not: load it before the module is quantised"


def _common_prefix(plan: ModulePlan) -> str | None:
    """What stands before every missing name in the checkpoint, such as ``module.``; None if there is no such prefix."""
    surplus = frozenset(plan.unexpected)
    for name in surplus if plan.missing else ():
        prefix = name.removesuffix(plan.missing[0])
        if prefix != name and prefix.endswith(".") and all(prefix + missing in surplus for missing in plan.missing):
            return prefix
    return None


def _keep_values(inventory: Inventory, plan: ModulePlan, names: Iterable[str]) -> bool:
    """Whether the tensors ``names`` will have the values on disk.

    Not if a routine fills one of them, and its module's state dict does not contain that very tensor: such a routine converts what it
    receives, so both tensors may have the same value in the end.
    """
    for name in names:
        if (owner := plan.owned.get(name)) is None:
            continue
        module, tensor = inventory.self_loading[owner], inventory.slots[name].tensor
        plain, inside = Names.of(module).plain, name[len(owner) + 1 :] if owner else name
        state = module.state_dict(keep_vars=True)
        if not any(plain(wrapped) == inside and value is tensor for wrapped, value in state.items()):
            return False
    return True


def _check_plain(slot: Slot, where: str) -> None:
    """Refuses tensor subclasses: their memory may be shared or on another rank."""
    tensor = slot.tensor
    if is_distributed(tensor):
        way_out = (
            "which all of its processes fill together: init_process_group must have been called, and each must call load_model"
        )
        in_routine = "and the module that it is in loads itself; remove its hooks or overrides"
        found = f"it is {an(type(tensor).__name__)}, {way_out if slot.part is None else in_routine}"
        _refuse(slot.name, where, "a plain tensor was expected", found)
    if hasattr(tensor, "__tensor_flatten__") or (type(tensor) not in PLAIN_TYPES and not is_lazy(tensor)):
        _refuse(slot.name, where, "a plain tensor was expected", f"it is {an(type(tensor).__name__)}")


def _check_offloaded(slot: Slot, offloaded: Offloaded, device: torch.device | None, where: str) -> None:
    """Refuses a tensor that accelerate reads from a place that a load cannot fill, or that ``device`` would move."""
    if offloaded.problem:
        actual = f"accelerate offloads it, and {offloaded.problem}"
        _refuse(slot.name, where, "a tensor that can be filled was expected", actual)
    if device is not None and not offloaded.spare:
        _refuse(slot.name, where, "a tensor that can be moved was expected", "accelerate offloads it; leave out device=")


def _check_fillable(slot: Slot, dtypes: Dtypes | None, device: torch.device | None, where: str) -> int:
    """Refuses a tensor that cannot be overwritten in place. Returns its `reach`, 0 on the meta device.

    ``dtypes``: on disk and in the module, if these differ.
    """
    tensor = slot.memory
    if not slot.address:  # all others are plain and strided, and have memory
        if type(tensor) not in PLAIN_TYPES:
            _check_plain(slot, where)
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            _refuse(slot.name, where, "a strided tensor was expected", f"its layout is {layout}")
    if dtypes is not None:
        stored, own = dtypes
        if tensor.is_quantized:
            _refuse(slot.name, where, "a plain tensor was expected", f"it is quantized ({_short(own)})")
        if torch.float4_e2m1fn_x2 in dtypes:
            _refuse(slot.name, where, f"dtype {_short(stored)} was expected", f"it is {_short(own)}, and torch has no cast")
    if not slot.address and tensor.is_meta:
        return 0
    if slot.part is not None and not stays(tensor, device):
        found = f"it is distributed and on {tensor.device}; move the module first, or leave out device="
        _refuse(slot.name, where, f"a tensor on {device} was expected", found)
    nbytes = tensor.nbytes
    is_usual = tensor.is_contiguous() and not tensor.storage_offset()
    if is_usual and nbytes <= tensor.untyped_storage().nbytes():
        return nbytes  # nearly all tensors; what follows would say the same of them
    reached = _check_reach(slot, where)
    if tensor.is_contiguous():
        return reached
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        _refuse(slot.name, where, "memory for each element was expected", "it is expanded; call .contiguous() on it first")
    if _may_overlap_itself(tensor):
        actual = f"some elements share memory, its strides are {list(tensor.stride())}; call .contiguous() on it first"
        _refuse(slot.name, where, "memory for each element was expected", actual)
    return reached


def _check_memory(slot: Slot, where: str) -> None:
    """Refuses a strided tensor whose memory was freed or made smaller: torch writes beyond the end of it."""
    tensor = slot.memory
    if tensor.layout is torch.strided and not (is_lazy(tensor) or tensor.is_meta or tensor.is_nested):
        _check_reach(slot, where)


def _check_reach(slot: Slot, where: str) -> int:
    reached = reach(slot.memory)
    if lacks_memory(slot.memory, reached):
        _refuse(slot.name, where, "memory for all its elements was expected", "its storage was freed or made smaller")
    return reached


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory; assumed for strides that no slicing or transposing of a dense tensor produces."""
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < end:
            return True
        end += (size - 1) * stride
    return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(name: str, where: str, expected: str, actual: str) -> NoReturn:
    raise UnsupportedTensorError(f"cannot fill {name!r} from {where}: {expected}, {actual}; the module is unchanged")
