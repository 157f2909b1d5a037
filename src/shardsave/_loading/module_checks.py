"""Refuses what a plan cannot do, before any tensor of the module is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import torch
from torch import nn

from shardsave._common.memory import address
from shardsave._format.dtypes import BY_NAME
from shardsave._loading.allocation import stays
from shardsave._loading.module_plan import ModulePlan
from shardsave._loading.slots import Inventory, Slot, ancestor
from shardsave._loading.tensor_checks import check_fillable, check_plain, check_shaped, refuse_overlaps
from shardsave._state.module import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError

#: Whether two stored tensors have the same bytes.
SameBytes = Callable[[Located, Located], bool]


def check_names(inventory: Inventory, plan: ModulePlan, strict: bool, where: str) -> None:
    """Refuses ambiguous names, tensors that no routine can be trusted with, and, if ``strict``, every difference, all listed.

    ``where``: the path of the checkpoint, for messages.
    """
    if len(inventory.leaders) != len(inventory.slots):
        twice, _ = Counter(slot.name for slot in inventory.slots).most_common(1)[0]
        raise IncompatibleCheckpointError(
            f"cannot load {where}: tensors with names of their own were expected in the module, two are {twice!r} without the names of "
            f"wrappers; the module is unchanged"
        )
    owners = {routine.name for routine in plan.routines}
    for slot in inventory.slots if owners else ():
        if ancestor(slot.name, owners) is not None and (slot.saved or slot.name in plan.stored):
            check_plain(slot, where)
    check_shapes(inventory, plan, where)
    if strict and (plan.missing or plan.unexpected or plan.mismatched):
        _refuse_differences(plan, where)


def check_shapes(inventory: Inventory, plan: ModulePlan, where: str) -> None:
    """Refuses lazy parameters among the matched names."""
    for slot in inventory.slots:
        if slot.name in plan.matched:
            check_shaped(slot, where)


def check_destinations(
    inventory: Inventory,
    plan: ModulePlan,
    owners: Mapping[str, nn.Module],
    device: torch.device | None,
    same_bytes: SameBytes,
    where: str,
) -> None:
    """Refuses memory that cannot be filled in place, tied tensors whose stored values differ, and tensors that overlap in memory.

    ``owners``: the sub-modules that load themselves, by name.
    """
    dtypes = {dtype: BY_NAME[dtype].torch for dtype in {located.dtype for located in plan.stored.values()}}
    slots = {slot.name: slot for slot in inventory.slots}
    for slot in inventory.slots:
        if slot.name in plan.matched and slot.name not in plan.mismatched:
            check_fillable(slot, dtypes[plan.stored[slot.name].dtype], where)
    for left, right in plan.must_equal:
        if not same_bytes(plan.stored[left], plan.stored[right]):
            _check_unequal(slots[left], slots[right], owners, where)
    routed = {name: owner for name, owner in plan.destinations.items() if owner is not None}
    filled = (slots[name] for name in plan.destinations if name not in routed or address(slots[name].tensor))
    refuse_overlaps((slot for slot in filled if stays(slot.tensor, device)), routed, where)


def _check_unequal(left: Slot, right: Slot, owners: Mapping[str, nn.Module], where: str) -> None:
    """Refuses two names of one tensor that have different values on disk.

    If a routine fills one of them, this counts only if its state dict has that very tensor: other routines change what they receive,
    and may end with the same value.
    """
    if all(_is_in_state_dict(slot, owners) for slot in (left, right)):
        raise IncompatibleCheckpointError(
            f"cannot load {where}: {left.name!r} and {right.name!r} are one tensor in the module and were expected to be equal on "
            f"disk, they differ; the module is unchanged"
        )


def _is_in_state_dict(slot: Slot, owners: Mapping[str, nn.Module]) -> bool:
    """Whether the state dict of the slot's owner in ``owners`` has the very tensor; true outside of all owners."""
    owner = ancestor(slot.name, owners)
    if owner is None:
        return True
    names = Names.of(owners[owner])
    inside = slot.name[len(owner) + 1 :] if owner else slot.name
    state = owners[owner].state_dict(keep_vars=True)
    return any(names.plain(wrapped) == inside and value is slot.tensor for wrapped, value in state.items())


def check_meta_buffers(inventory: Inventory, where: str) -> None:
    """Refuses buffers on the meta device that are not saved: nothing would fill them."""
    expected = inventory.expected_names()
    left = [slot.name for slot in inventory.slots if slot.is_buffer and slot.tensor.is_meta and slot.name not in expected]
    if left:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: buffers with data were expected, these are not saved and on the meta device: {_listed(left)}; "
            f"give them values first; the module is unchanged"
        )


def _refuse_differences(plan: ModulePlan, where: str) -> NoReturn:
    differences = (
        ("missing from the checkpoint", plan.missing),
        ("not in the module", plan.unexpected),
        ("mismatched", sorted(plan.mismatched.values())),
    )
    parts = [f"{len(names)} {words}: {_listed(names)}" for words, names in differences if names]
    hint = ""
    if any(name.startswith(".") for name in plan.unexpected):
        hint = "; a name begins with a dot where the prefix ends without its own: end it with one, as in 'encoder.'"
    raise IncompatibleCheckpointError(
        f"cannot load {where}: the module's names and shapes were expected, there are {'; '.join(parts)}{hint}; the module is unchanged"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
