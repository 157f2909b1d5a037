"""Fills a live module as a plan says, in phases; only the first phase can refuse without having changed anything."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Union

import torch

from shardsave._common.boxes import box
from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory_errors import check_free_memory
from shardsave._common.spread import Spread
from shardsave._loading.allocation import allocate, host_bytes, stays
from shardsave._loading.disk_layout import DiskLayout, Join
from shardsave._loading.freeze_flags import RestoredFlags, named_parameters, restore_flags
from shardsave._loading.joined_parts import parts_seen
from shardsave._loading.module_checks import (
    check_destinations,
    check_differences,
    check_meta_buffers,
    check_shapes,
    check_unexpected,
)
from shardsave._loading.module_plan import ModulePlan, plan_again
from shardsave._loading.onload import onloaded
from shardsave._loading.read import Target, TensorReader
from shardsave._loading.routines import read_joined, run_routine
from shardsave._loading.slots import Inventory, Slot, take_again
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError

#: A tensor of the module, or the part of it in this process.
Destination = Union[torch.Tensor, Spread]


class Differences(NamedTuple):
    """Names that are only in the module or only in the checkpoint, including those that self-loading sub-modules report."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


class ModuleFiller:
    """Changes the module of ``inventory`` as ``plan`` says. The phases, in order:

    1. `check`: everything that can be refused is refused; nothing is changed.
    2. `fill` allocates memory for meta tensors and moves tensors to ``device``;
    3. it runs the sub-modules that load themselves, because they can still refuse what they receive;
    4. it reads everything else straight into the module's memory.
    5. `restore_flags` sets ``requires_grad``.
    """

    def __init__(
        self, inventory: Inventory, plan: ModulePlan, layout: DiskLayout, checkpoint: Checkpoint, device: torch.device | None
    ) -> None:
        self.plan = plan
        self.notes: tuple[str, ...] = ()  # for the report, after `check`
        #: After `check`: how much new memory on the CPU the load will take: what is allocated for good, and the copies for one routine
        #: at a time.
        self.host_bytes = 0
        self._inventory = inventory
        self._layout = layout
        self._checkpoint = checkpoint
        self._device = device
        self._total = len(plan.reads)
        self._before = 0  # how many tensors the reader had read before those of the module
        self._apart: frozenset[str] = frozenset()  # names that are read one at a time
        self._origins: dict[str, tuple[str, ...]] = {}  # of the parameters that routines filled
        self._unused: frozenset[str] = frozenset()  # names that routines reported as unexpected

    @gc_paused()
    def check(self, *, strict: bool, prefix: str | None = None, alone: bool = True) -> None:
        """Raises IncompatibleCheckpointError or UnsupportedTensorError if the module cannot be filled; ``strict``: also if names differ.

        Raises OutOfMemoryError if its new memory surely does not fit. ``prefix``: the caller's argument, for advice in messages; None if
        the caller has none. ``alone``: otherwise `check_unexpected` follows, if ``strict``.
        """
        where = self._checkpoint.path
        check_differences(self._inventory, self.plan, strict, where, prefix, alone=alone)
        self._check_destinations()
        check_meta_buffers(self._inventory, where)
        self.host_bytes = self._host_bytes()
        self.notes = check_free_memory(where, self.host_bytes, "the module is unchanged")

    def filled_elsewhere(self, names: Collection[str]) -> None:
        """Other processes that load too have a place for the stored ``names``."""
        self.plan = replace(self.plan, unexpected=tuple(name for name in self.plan.unexpected if name not in names))

    def check_unexpected(self, prefix: str | None) -> None:
        """Raises IncompatibleCheckpointError if there are stored tensors for which no process has a place."""
        check_unexpected(self.plan, self._checkpoint.path, prefix)

    def filled(self) -> list[tuple[str, Located, torch.Tensor]]:
        """The tensors that are filled in the memory that they have now: name, stored tensor, tensor."""
        slots, stored = self._inventory.slots, self.plan.stored
        names = [name for name in self.plan.destinations if name in stored]
        return [(name, stored[name], slots[name].memory) for name in names if stays(slots[name].memory, self._device)]

    def _host_bytes(self) -> int:
        plan = self.plan
        received = ([plan.stored[name] for name in routine.tensors] for routine in plan.routines)
        copies = (sum({id(located): located.nbytes for located in tensors}.values()) for tensors in received)  # ties once
        allocated = host_bytes(self._inventory, [*plan.routed, *plan.in_place], plan.owned, self._device)
        return allocated + max(copies, default=0)

    def fill(self, reader: TensorReader, *, strict: bool) -> Differences:
        """Fills the module. Errors say how many tensors were loaded before. ``strict``: for the sub-modules that load themselves."""
        self._before = reader.tensors
        with self._counting(reader):
            self._allocate([*self.plan.routed, *self.plan.in_place])
        missing, unexpected = self._run_routines(reader, strict)
        self._unused = frozenset(unexpected)
        self._read_in_place(reader)
        self._update_spare_copies()
        return Differences(self.plan.missing + missing, self.plan.unexpected + unexpected)

    @gc_paused()
    def restore_flags(self) -> RestoredFlags:
        # Routines may have replaced parameters, also those of their own sub-modules.
        inventory = take_again(self._inventory) if self.plan.routines else self._inventory
        parameters = named_parameters(inventory, [routine.name for routine in self.plan.routines])
        return restore_flags(parameters, self.plan.flags, sorted(self.plan.routed - self._unused), self._origins)

    def _allocate(self, filled: Collection[str]) -> None:
        self._inventory = allocate(self._inventory, filled, self.plan.owned, self._device)

    def _run_routines(self, reader: TensorReader, strict: bool) -> Differences:
        """Lets one sub-module after the other load itself, so that the copies of only one are in memory at a time.

        Only joined tensors that are not all of one sub-module are read and converted before the first one runs.
        """
        joined: dict[str, torch.Tensor] = {}
        missing: list[str] = []
        unexpected: list[str] = []
        own_joins: dict[str, list[Join]] = {}
        for join in self.plan.joins if self.plan.routed else ():
            owners = {self.plan.owned.get(target) for target in join.targets}
            if len(owners) == 1 and (owner := owners.pop()) is not None:
                own_joins.setdefault(owner, []).append(join)
            elif not self.plan.routed.isdisjoint(join.targets):
                joined.update(self._read_joined(join, reader))
        offloaded = [slot for slot in self._inventory.slots.values() if slot.offloaded is not None]
        for routine in self.plan.routines:
            for join in own_joins.get(routine.name, ()):
                joined.update(self._read_joined(join, reader))
            module = self._inventory.self_loading[routine.name]
            of_routine = [slot for slot in offloaded if self.plan.owned.get(slot.name) == routine.name]
            with self._counting(reader), onloaded(of_routine):
                answer = run_routine(module, routine, self.plan.stored, joined, reader, strict, self._layout.may_be_missing)
            missing += answer.missing
            unexpected += answer.unexpected
            self._origins.update(answer.origins)
        if self.plan.routines and self.plan.in_place:
            with self._counting(reader):
                self._follow_routines()
        return Differences(tuple(missing), tuple(unexpected))

    def _follow_routines(self) -> None:
        """Takes the inventory again and plans again, because a routine may have replaced tensors of other sub-modules.

        Raises IncompatibleCheckpointError if a tensor is gone, has another shape, or cannot be filled.
        """
        old_plan = self.plan
        self._inventory = take_again(self._inventory)
        try:
            removed = sorted(set(old_plan.in_place) - self._inventory.slots.keys())
            if removed:
                raise IncompatibleCheckpointError(self._changed(f"{removed[0]} was removed"))
            check_shapes(self._inventory, old_plan, self._checkpoint.path)
            self.plan = plan_again(old_plan, self._inventory)
            changed = sorted(self.plan.mismatched.keys() - old_plan.mismatched.keys())
            if changed:
                raise IncompatibleCheckpointError(self._changed(self.plan.mismatched[changed[0]]))
            self._check_destinations()
        except ShardSaveError as error:
            raise IncompatibleCheckpointError(
                f"{str(error).removesuffix('; the module is unchanged')}; the loading routine of another sub-module caused this"
            ) from error
        self._allocate(self.plan.in_place)

    def _changed(self, difference: str) -> str:
        return f"cannot load {self._checkpoint.path}: the module's names and shapes were expected, {difference}"

    def _check_destinations(self) -> None:
        self._apart = check_destinations(self._inventory, self.plan, self._device, self._checkpoint)

    def _read_in_place(self, reader: TensorReader) -> None:
        with gc_paused():
            slots = [self._inventory.slots[name] for name in self.plan.in_place]
            destinations = {slot.name: _destination(slot) for slot in slots}
            together = {name: t for name, t in destinations.items() if name not in self._apart} if self._apart else destinations
            targets, unviewed = self._targets(together)
            targets += [(beside.located, beside.memory()) for beside in self.plan.beside]
        for join in unviewed:
            if self.plan.routed.isdisjoint(join.targets):
                self._read_joined(join, reader)
        # autograd does not notice these writes; with a new version number, a stale backward raises. A save in the background that still
        # reads these tensors fails, and does so only if the number changes before they do. Inference tensors are skipped.
        # Of a distributed tensor, both it and the local one in it have a number.
        torch.autograd.graph.increment_version([slot.memory for slot in slots])
        torch.autograd.graph.increment_version([slot.tensor for slot in slots if slot.part is not None])
        with self._counting(reader, in_place=True):
            reader.read_together(targets)
            for name in destinations if self._apart else ():
                if name in self._apart:
                    reader.read([(self.plan.stored[name], destinations[name])])

    def _update_spare_copies(self) -> None:
        """Copies buffers to where accelerate keeps a copy of them, which it puts in their place when its hooks are removed."""
        for slot in self._inventory.slots.values():
            spare = slot.offloaded.tensor if slot.offloaded is not None and slot.offloaded.spare else None
            if spare is not None and not slot.tensor.is_meta:
                with torch.no_grad():
                    spare.copy_(slot.tensor)

    def _targets(self, destinations: Mapping[str, Destination]) -> tuple[list[Target], list[Join]]:
        """What is read straight into ``destinations`` (name → tensor), and the joins that have to be read into copies."""
        stored = self.plan.matched
        joins = self.plan.joins
        if not joins:
            return [*zip(map(stored.__getitem__, destinations), destinations.values())], []
        joined = {target for join in joins for target in join.targets}
        targets: list[Target] = [(stored[name], tensor) for name, tensor in destinations.items() if name not in joined]
        slots = self._inventory.slots
        tensors = {name: slots[name].form.detach() for name in joined if name in slots}
        views = self._layout.views(tensors) if tensors else [None] * len(joins)
        unviewed, wanted = [], self.plan.routed.union(destinations)
        for join, of_join in zip(joins, views):
            sources = None if of_join is None else parts_seen(of_join, [slots[t] for t in join.targets if t in slots])
            if sources is not None and destinations.keys() >= set(join.targets):
                targets += zip(join.sources, sources)
            elif not wanted.isdisjoint(join.targets):
                unviewed.append(join)
        return targets, unviewed

    def _read_joined(self, join: Join, reader: TensorReader) -> dict[str, torch.Tensor]:
        """Reads and converts ``join``, copies into the module what is read in place, and returns what routines receive."""
        with self._counting(reader):
            values = read_joined(join, reader)
        in_place = set(self.plan.in_place)
        for name, value in values.items():
            if name in in_place:
                _copy_into(self._inventory.slots[name], value)
        return {name: value for name, value in values.items() if name in self.plan.routed}

    @contextmanager
    def _counting(self, reader: TensorReader, *, in_place: bool = False) -> Iterator[None]:
        """Adds to errors how much was loaded. If a checksum is wrong ``in_place``, the other tensors of the same read are loaded too."""
        loaded = reader.tensors
        try:
            yield
        except ShardSaveError as error:
            if reader.is_of_job(error):
                raise
            if in_place and isinstance(error, CorruptCheckpointError):
                loaded = reader.tensors
            raise type(error)(
                f"{error}; the module is partly loaded, {loaded - self._before} of {self._total} tensors"
            ) from error


def _copy_into(slot: Slot, value: torch.Tensor) -> None:
    with torch.inference_mode(slot.memory.is_inference()), torch.no_grad():
        if slot.part is None:
            slot.tensor.detach().copy_(value)
            return
        for begin, tensor in slot.part.spread.local:
            tensor.copy_(value[box(begin, tensor.shape)])


def _destination(slot: Slot) -> Destination:
    """`Tensor.data`: if the tensor gets other data during the load, this memory stays alive. It is cheaper than `detach`."""
    return slot.tensor.data if slot.part is None else slot.part.spread
