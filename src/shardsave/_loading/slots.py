"""The inventory of a live module: its tensors by every name, and the sub-modules that have loading routines of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory import PLAIN_TYPES, address, shared_names
from shardsave._format.quantised import part_name
from shardsave._state.distributed_tensors import LocalPart, NotReadable, PartReader, is_distributed, tied_parts
from shardsave._state.module import EXTRA_STATE
from shardsave._state.offload import Offloaded, offloaded_tensors
from shardsave._state.quantised import quantised
from shardsave._state.self_loading import own_routines
from shardsave._state.sharded import refuse_sharded
from shardsave._state.wrappers import Names, unwrap
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError


class Slot(NamedTuple):
    """One name of a tensor: the sub-module that owns it, the attribute there, and the tensor. ``saved``: the state dict has the name.

    ``memory``: the tensor that has the memory in this process: ``tensor`` itself or, if it is distributed over several ranks, its local
    one; ``part`` is then the part in this process. ``address``: that of ``memory``, 0 if it has none.
    If accelerate offloads it, ``tensor`` is where accelerate reads the values, and ``offloaded`` says what is known of that place.
    The exception is a spare copy in ``offloaded``. ``whole``: the quantised parameter of which ``tensor`` is a part.
    """

    name: str
    owner: nn.Module
    attribute: str
    tensor: torch.Tensor
    memory: torch.Tensor
    address: int
    is_buffer: bool
    saved: bool
    offloaded: Offloaded | None = None
    whole: torch.Tensor | None = None
    part: LocalPart | None = None

    @property
    def form(self) -> torch.Tensor:
        """A tensor with dtype and shape of the whole: the tensor or, if it is distributed, one on the meta device."""
        return self.tensor if self.part is None else self.part.spread.stand_in

    def with_memory(self, tensor: torch.Tensor) -> Slot:
        """The slot with ``tensor``, which is whole in this process."""
        return self._replace(tensor=tensor, memory=tensor, address=address(tensor))


#: For every name of every sub-module, the module itself first: the prefix of names inside it (without wrappers), and the sub-module.
SubModules = Sequence[tuple[str, nn.Module]]


class Inventory(NamedTuple):
    """Everything that a load has to know about a module, at one moment.

    ``module``: without wrappers. ``slots``: its parameters and buffers by every name, in module order. ``leaders``: name → the first
    name with the same memory, if that is another name. ``expected``: the names in its state dict. ``extra_states``: the names of extra
    state. ``self_loading``: the outermost sub-modules that have a loading routine of their own, by name; "" is the whole module.
    ``parts``: reads distributed tensors; None if this process loads alone.
    """

    module: nn.Module
    slots: dict[str, Slot]
    leaders: dict[str, str]
    expected: frozenset[str]
    extra_states: tuple[str, ...]
    self_loading: dict[str, nn.Module]
    parts: PartReader | None = None

    def leader(self, name: str) -> str:
        """The first name with the same memory."""
        return self.leaders.get(name, name)


@gc_paused()
def take_inventory(module: nn.Module, where: str, parts: PartReader | None = None) -> Inventory:
    """The inventory of ``module``; ``where``: the path of the checkpoint, for messages. ``parts``: reads distributed tensors.

    Raises UnsupportedTensorError for a wrapper of FSDP's older version and for a distributed tensor that cannot be read,
    IncompatibleCheckpointError if two tensors have one name.
    """
    module = unwrap(module)
    named = list(module.named_modules(remove_duplicate=False))
    refuse_sharded(named, "fill", "the module is unchanged")
    sub_modules = _sub_modules(named)
    slots = _slots(module, sub_modules, parts, where)
    inventory = _inventory(module, sub_modules, slots, parts)
    if len(inventory.slots) != len(slots):
        duplicate, _ = Counter(slot.name for slot in slots).most_common(1)[0]
        raise IncompatibleCheckpointError(
            f"cannot load {where}: one tensor for each name was expected in the module, two are named {duplicate!r} without the names "
            f"of wrappers; the module is unchanged"
        )
    return inventory


@gc_paused()
def take_again(inventory: Inventory) -> Inventory:
    """The inventory of the same module now, when its tensors may have been replaced; ``self_loading`` stays as it was."""
    sub_modules = _sub_modules(list(inventory.module.named_modules(remove_duplicate=False)))
    parts = inventory.parts
    now = _inventory(inventory.module, sub_modules, _slots(inventory.module, sub_modules, parts, "the checkpoint"), parts)
    return now._replace(self_loading=inventory.self_loading)


def has_extra_state(module: nn.Module) -> bool:
    """Whether ``module`` or one of its sub-modules has extra state."""
    return any(map(_overrides_extra_state, {type(part) for part in module.modules()}))


def _inventory(module: nn.Module, sub_modules: SubModules, slots: list[Slot], parts: PartReader | None) -> Inventory:
    named = {slot.name: slot for slot in slots}
    with_state = {kind for kind in {type(part) for _, part in sub_modules} if _overrides_extra_state(kind)}
    extra_states = tuple(start + EXTRA_STATE for start, part in sub_modules if type(part) in with_state)
    return Inventory(
        module=module,
        slots=named,
        leaders=_leaders(named),
        expected=frozenset([*[slot.name for slot in slots if slot.saved], *extra_states]),
        extra_states=extra_states,
        self_loading=_self_loading(sub_modules),
        parts=parts,
    )


def _overrides_extra_state(kind: type[nn.Module]) -> bool:
    return kind.get_extra_state is not nn.Module.get_extra_state


def _sub_modules(named: Sequence[tuple[str, nn.Module]]) -> SubModules:
    names = Names(named)
    return [named[0], *((names.plain(f"{name}."), part) for name, part in named[1:])]


def _slots(module: nn.Module, sub_modules: SubModules, parts: PartReader | None, where: str) -> list[Slot]:
    offloaded = offloaded_tensors(module, fill=True)
    in_module = list(_slots_in_module(sub_modules))
    if parts is not None:
        in_module = [with_part(slot, parts, where) for slot in in_module]
    if not offloaded:
        return in_module
    slots = []
    for slot in in_module:
        if (found := offloaded.get(slot.name)) is not None:
            slot = slot._replace(offloaded=found)
            if found.tensor is not None and not found.spare:
                slot = slot.with_memory(found.tensor)
        slots.append(slot)
    return slots


def with_part(slot: Slot, parts: PartReader, where: str) -> Slot:
    """``slot`` with the part of its tensor in this process, if it is distributed. Raises UnsupportedTensorError."""
    if not is_distributed(slot.tensor):
        return slot
    try:
        part = parts.read(slot.tensor)
        return slot._replace(memory=part.local, address=address(part.local), part=part)
    except NotReadable as error:
        raise UnsupportedTensorError(
            f"cannot fill {slot.name!r} from {where}: {error.expected}, {error.found}; the module is unchanged"
        ) from error


def _slots_in_module(sub_modules: SubModules) -> Iterator[Slot]:
    for start, owner in sub_modules:
        not_saved = owner._non_persistent_buffers_set
        for attribute, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if type(parameter) in PLAIN_TYPES or (found := quantised(parameter)) is None:
                yield Slot(start + attribute, owner, attribute, parameter, parameter, address(parameter), False, True)
                continue
            for key, part in found.parts.items():
                name = part_name(start + attribute, key)
                yield Slot(name, owner, attribute, part, part, address(part), False, True, whole=parameter)
        for attribute, buffer in owner._buffers.items():
            if buffer is not None:
                saved = attribute not in not_saved
                yield Slot(start + attribute, owner, attribute, buffer, buffer, address(buffer), True, saved)


def _leaders(slots: Mapping[str, Slot]) -> dict[str, str]:
    begins = [slot.address or id(slot.memory) for slot in slots.values()]
    leaders = {}
    if len(set(begins)) < len(begins):
        leaders = shared_names({name: slot.memory for name, slot in slots.items()}, begins)
    parts = {name: slot.part.spread for name, slot in slots.items() if slot.part is not None}
    return tied_parts({name: slots[name].tensor for name in parts}, parts, leaders) if parts else leaders


def _self_loading(sub_modules: SubModules) -> dict[str, nn.Module]:
    outermost: dict[str, nn.Module] = {}
    for (start, part), has_own_routine in zip(sub_modules, own_routines([part for _, part in sub_modules])):
        if has_own_routine and ancestor(start, outermost) is None:
            outermost[start.removesuffix(".")] = part
    return outermost


def ancestor(name: str, owners: Mapping[str, object]) -> str | None:
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
    """Whether the slot is the counter of a batch norm. As in torch, a state that is older than this counter is accepted without it."""
    return slot.attribute == "num_batches_tracked" and isinstance(slot.owner, _NormBase)
