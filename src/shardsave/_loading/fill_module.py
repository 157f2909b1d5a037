"""Filling a live module: memory for it, what is read into it and in which order, and its flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._common.gc_pause import collector_still
from shardsave._format.dtypes import BY_NAME
from shardsave._loading.fill_groups import Group, Join, Joins, copy_of, give
from shardsave._loading.slots import Slot, ancestor, counts_batches, leaders, slots, sub_modules
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located


class Fit:
    """How a checkpoint goes into a module. Nothing has been changed until `materialise` is called."""

    def __init__(
        self, module: nn.Module, device: torch.device | None, stored: Mapping[str, Located], joins: Joins | None = None
    ) -> None:
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.mismatched: tuple[str, ...] = ()
        self.module = module
        self._device = device
        self.stored = stored
        self._joins = joins
        self.sub_modules = sub_modules(module)
        self.slots = slots(self.sub_modules)
        self.leaders = leaders(self.slots)  # every name → the first name with the same memory
        self.direct: list[str] = []
        self.hooked: list[tuple[str, nn.Module, dict[str, str]]] = []
        self.extra_states: Mapping[str, Any] = {}
        self.left_alone: set[str] = set()
        self.changed_flags = 0  # of how many parameters
        self._done: list[torch.Tensor] = []
        self.look_again: Callable[[bool], tuple[list[str], list[str]]] = lambda strict: ([], [])

    @property
    def _names(self) -> list[str]:
        """The names in the module whose bytes are read."""
        return [*(name for _, _, own in self.hooked for name in own), *self.direct]

    @property
    def reads(self) -> list[Located]:
        """The stored tensors that are read."""
        names = self._names
        if self._joins is None:
            return [self.stored[name] for name in names]
        joins, wanted = self._joins.joins, set(names)
        joined = {target for join in joins for target in join.targets}
        parts = [source for join in joins if not wanted.isdisjoint(join.targets) for source in join.sources]
        return [*(self.stored[name] for name in names if name not in joined), *parts]

    def materialise(self, names: Iterable[str] | None = None) -> None:
        """Puts real memory behind meta tensors, and moves to the device asked for what is elsewhere; ties are kept.

        ``names``: what is going to be filled; everything that is read by default.
        """
        moving = [slot for slot in self.slots if not self.stays(slot.tensor)]
        if not moving:
            return
        owners = {name for name, _, _ in self.hooked}
        filled = {self.leaders[name] for name in (self._names if names is None else names) if name in self.leaders}
        theirs = {self.leaders[slot.name] for slot in self.slots if ancestor(slot.name, owners) is not None}
        memory: dict[str, torch.Tensor] = {}
        parameters: dict[int, nn.Parameter] = {}
        # Parameters made in inference mode could never be trained: the caller's mode must not get into the module.
        with torch.inference_mode(False), torch.no_grad():
            for slot in moving:
                tensor, leader = slot.tensor, self.leaders[slot.name]
                if tensor.is_meta and not (leader in filled or leader in theirs or counts_batches(slot)):
                    continue
                if leader not in memory:
                    memory[leader] = self._new_memory(tensor, leader in filled)
                if slot.is_buffer or tensor.is_meta:
                    _replace(slot, memory[leader], parameters)
                    continue
                tensor.data = memory[leader]
                if tensor.grad is not None:
                    tensor.grad.data = tensor.grad.data.to(memory[leader].device)
        self.slots = slots(self.sub_modules)

    def stays(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is filled in the memory that it has."""
        return not tensor.is_meta and (self._device is None or is_lazy(tensor) or _same_device(tensor.device, self._device))

    def _new_memory(self, tensor: torch.Tensor, will_be_filled: bool) -> torch.Tensor:
        target = self._device or torch.device("cpu")
        if will_be_filled:
            return torch.empty_like(tensor.detach(), device=target)
        return torch.zeros_like(tensor, device=target) if tensor.is_meta else tensor.detach().to(target)

    def groups(self) -> Iterator[Group]:
        """What is to be read: one sub-module with a loading routine of its own after the other, then all that goes straight in.

        The routines come first, since they can still refuse what they are given. What has to be joined in a copy comes one by one.
        """
        current = {slot.name: slot.tensor for slot in self.slots}
        given: dict[str, torch.Tensor] = {}
        theirs = {name for _, _, own in self.hooked for name in own}
        for join in self._joins.joins if self._joins is not None and theirs else []:
            if not theirs.isdisjoint(join.targets):
                yield self._join_apart(join, current, given)
        for owner_name, owner, own in self.hooked:
            start = f"{owner_name}." if owner_name else ""
            extra = {n[len(start) :]: value for n, value in self.extra_states.items() if n.startswith(start)}
            yield give(owner_name, owner, own, self.stored, given, extra)
        if self.hooked and self.direct:
            yield Group((), False, self.look_again)
        with collector_still():
            if self.hooked:
                current = {slot.name: slot.tensor for slot in self.slots}
            direct, apart = self._join_in_place(current)
        while apart:
            join = apart.pop(0)
            if theirs.isdisjoint(join.targets):
                yield self._join_apart(join, current, given)
        yield Group(tuple(direct))

    def _join_in_place(self, current: Mapping[str, torch.Tensor]) -> tuple[list[tuple[Located, torch.Tensor]], list[Join]]:
        """What goes straight into the module's memory, and the joins that do not."""
        self._done = [current[name].detach() for name in self.direct]
        if self._joins is None:
            return [*zip(map(self.stored.__getitem__, self.direct), self._done)], []
        joins = self._joins.joins
        targets = {target for join in joins for target in join.targets}
        direct = [(self.stored[name], own) for name, own in zip(self.direct, self._done) if name not in targets]
        tensors = {name: current[name].detach() for name in targets if name in current}
        views = self._joins.views(tensors) if tensors else [None] * len(joins)
        apart, straight, wanted = [], set(self.direct), set(self._names)
        for join, inside in zip(joins, views):
            if inside is not None and straight.issuperset(join.targets):
                direct += zip(join.sources, inside)
            elif not wanted.isdisjoint(join.targets):
                apart.append(join)
        return direct, apart

    def _join_apart(self, join: Join, current: Mapping[str, torch.Tensor], given: dict[str, torch.Tensor]) -> Group:
        """Copies of all that is joined; what they make goes into the module, or is kept for a routine of its own."""
        copies = [copy_of(source) for source in join.sources]
        straight, theirs = set(self.direct), {name for _, _, own in self.hooked for name in own}

        def finish(strict: bool) -> tuple[list[str], list[str]]:
            made = join.convert(copies)
            copies.clear()
            for name, value in made.items():
                if name in theirs:
                    given[name] = value
                elif name in straight:
                    with torch.inference_mode(current[name].is_inference()), torch.no_grad():
                        current[name].detach().copy_(value)
            return [], []

        return Group(tuple(zip(join.sources, copies)), False, finish)

    def written(self) -> None:
        """Tells autograd that tensors were overwritten behind its back, so that a stale backward raises."""
        torch.autograd.graph.increment_version(self._done)  # which passes over those of inference mode
        self._done = []

    @collector_still()
    def notes(self) -> tuple[str, ...]:
        """Which values the module has in another dtype."""
        tensors = {slot.name: slot.tensor for slot in self.slots}
        filled = [(self.stored[name], tensors[name].dtype) for name in self.direct if name in tensors]
        cast = Counter((BY_NAME[stored.dtype].torch, dtype) for stored, dtype in filled)
        notes = [f"{number} cast from {have} to {want}" for (have, want), number in cast.items() if have != want]
        return tuple(note.replace("torch.", "") for note in notes)

    def restore_flags(self, flags: Mapping[str, bool] | None) -> int | None:
        """Sets ``requires_grad`` of floating-point parameters to what was saved; how many are frozen now, None if unknown.

        Where names that were saved apart with different flags are tied here, one trainable name makes the parameter trainable.
        """
        if flags is None:
            return None
        parameters: dict[int, torch.Tensor] = {}
        wanted: dict[int, bool] = {}
        for name, parameter in self._named_parameters():
            frozen = flags.get(name)
            if frozen is None or name in self.left_alone:
                continue
            if parameter.is_floating_point() or parameter.is_complex():
                key = id(parameter)
                parameters[key] = parameter
                wanted[key] = frozen and wanted.get(key, True)
        for parameter, frozen in zip(parameters.values(), wanted.values()):
            if parameter.requires_grad == frozen:
                self.changed_flags += 1
                with torch.inference_mode(parameter.is_inference()):  # outside, an inference tensor refuses the flag
                    parameter.requires_grad_(not frozen)
        return sum(wanted.values())

    def _named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by every name that it has, and by those that hooks of its sub-module give it on disk."""
        # A routine of a sub-module's own may have put others in the place of those that were there.
        for slot in slots(sub_modules(self.module)) if self.hooked else self.slots:
            if not slot.is_buffer:
                yield slot.name, slot.tensor
        for name, owner, _ in self.hooked:
            names = Names.of(owner)
            for own_name, value in owner.state_dict(keep_vars=True).items():
                if isinstance(value, nn.Parameter):
                    plain = names.plain(own_name)
                    yield f"{name}.{plain}" if name else plain, value


def _replace(slot: Slot, memory: torch.Tensor, parameters: dict[int, nn.Parameter]) -> None:
    """Puts ``memory`` in the place of a buffer or a meta parameter, with the attributes that others gave the old one."""
    if slot.is_buffer:
        memory.__dict__.update(slot.tensor.__dict__)
        slot.owner._buffers[slot.attribute] = memory
        return
    if id(slot.tensor) not in parameters:
        made = nn.Parameter(memory, requires_grad=slot.tensor.requires_grad)
        made.__dict__.update(slot.tensor.__dict__)
        parameters[id(slot.tensor)] = made
    slot.owner._parameters[slot.attribute] = parameters[id(slot.tensor)]


def _same_device(left: torch.device, right: torch.device) -> bool:
    if left.type != right.type or left.type == "cpu":
        return left.type == right.type
    if right.index is None and left.type == "cuda":
        return left.index == torch.cuda.current_device()
    return left.index == right.index or right.index is None
