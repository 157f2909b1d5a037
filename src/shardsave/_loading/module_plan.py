"""Plans how a checkpoint goes into a module: what goes where, and what differs. The plan is a value; nothing is read or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from shardsave._common.gc_pause import collector_still
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.layout import Join, Layout
from shardsave._loading.slots import Inventory, Slot, ancestor, counts_batches
from shardsave._storage.checkpoint import Located

Casts = Mapping[tuple[torch.dtype, torch.dtype], int]


class Routine(NamedTuple):
    """A sub-module that is loaded by its own routine; ``name`` "" is the whole module.

    ``tensors``: name in the module → name inside the sub-module, for everything stored below its name. ``extra_state``: name inside
    the sub-module → extra state that is plain data.
    """

    name: str
    tensors: Mapping[str, str]
    extra_state: Mapping[str, Any]


@dataclass(frozen=True)
class ModulePlan:
    """What goes where in a module.

    ``stored``: name in the module → stored tensor, from the layout, as are ``joins``. ``routines``: the sub-modules that load
    themselves, in module order. ``matched``: names that module and checkpoint have in common, without those of routines.
    ``destinations``: for each tensor that is filled, its first name → the name of the routine that fills it; None: it is read in place.
    ``must_equal``: pairs of names that are one tensor in the module but two on disk. ``missing``, ``unexpected``: names, sorted.
    ``mismatched``: name → how the shapes differ; these tensors are left alone. ``casts``: (dtype on disk, dtype in the module) → how
    many tensors read in place are cast. ``flags``: name → frozen, for the flags to restore; None: leave all flags alone.
    """

    stored: Mapping[str, Located]
    joins: tuple[Join, ...]
    routines: tuple[Routine, ...]
    matched: frozenset[str]
    destinations: Mapping[str, str | None]
    must_equal: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    casts: Casts
    flags: Mapping[str, bool] | None

    @cached_property
    def in_place(self) -> tuple[str, ...]:
        """One name for each tensor that is read straight into the module's memory."""
        return tuple(name for name, routine in self.destinations.items() if routine is None)

    @cached_property
    def routed(self) -> frozenset[str]:
        """The names of stored tensors that routines receive."""
        return frozenset(name for routine in self.routines for name in routine.tensors)

    @cached_property
    def reads(self) -> list[Located]:
        """The stored tensors that will be read."""
        names = [*(name for routine in self.routines for name in routine.tensors), *self.in_place]
        if not self.joins:
            return [self.stored[name] for name in names]
        wanted = set(names)
        joined = {target for join in self.joins for target in join.targets}
        sources = [source for join in self.joins if not wanted.isdisjoint(join.targets) for source in join.sources]
        return [*(self.stored[name] for name in names if name not in joined), *sources]

    def notes(self) -> tuple[str, ...]:
        """Which values are cast, for the report."""
        return tuple(
            f"{number} cast from {have} to {want}".replace("torch.", "") for (have, want), number in self.casts.items()
        )


@collector_still()
def plan_module(
    inventory: Inventory,
    layout: Layout,
    *,
    flags: Mapping[str, bool] | None = None,
    extra_states: Mapping[str, Any] | None = None,
    doubtful: Collection[str] = (),
) -> ModulePlan:
    """Plans how the tensors of ``layout`` go into the module of ``inventory``.

    ``flags``: the flags to restore, by the names that the checkpoint records. ``extra_states``: name → extra state that is plain data.
    ``doubtful``: names that are not unexpected, because third-party metadata only seems to say that they exist.
    """
    stored, expected = layout.stored, inventory.expected_names()
    routines = _routines(inventory, stored, extra_states or {})
    owners = {routine.name for routine in routines}
    routed = {name for name in expected | stored.keys() if ancestor(name, owners) is not None} if owners else set()
    matched = frozenset((stored.keys() & expected) - routed)
    mismatched = _mismatched(inventory.slots, stored, matched)
    destinations, must_equal = _destinations(inventory, stored, matched - mismatched.keys(), owners)
    flags = layout.flags(flags) if flags is not None else None
    return ModulePlan(
        stored=stored,
        joins=tuple(layout.joins),
        routines=routines,
        matched=matched,
        destinations=destinations,
        must_equal=must_equal,
        missing=_missing(inventory, layout, expected - stored.keys() - routed),
        unexpected=tuple(sorted(stored.keys() - expected - routed - set(doubtful))),
        mismatched=mismatched,
        casts=_casts(inventory, stored, destinations),
        flags=flags if not flags or not mismatched else {n: frozen for n, frozen in flags.items() if n not in mismatched},
    )


@collector_still()
def plan_again(plan: ModulePlan, inventory: Inventory) -> ModulePlan:
    """``plan`` for the tensors in ``inventory``, which was taken after routines have run: they may have replaced other tensors."""
    matched = plan.matched - plan.mismatched.keys()
    mismatched = _mismatched(inventory.slots, plan.stored, matched)
    owners = {routine.name for routine in plan.routines}
    destinations, must_equal = _destinations(inventory, plan.stored, matched - mismatched.keys(), owners)
    return replace(
        plan,
        destinations=destinations,
        must_equal=must_equal,
        mismatched={**plan.mismatched, **mismatched},
        casts=_casts(inventory, plan.stored, destinations),
    )


def _routines(inventory: Inventory, stored: Iterable[str], extra_states: Mapping[str, Any]) -> tuple[Routine, ...]:
    """The sub-modules that load themselves and for which the checkpoint has something.

    A routine receives everything below its name, also names that the module does not expect: such routines rename, drop and add names.
    """
    hooked = inventory.modules_with_routines()
    tensors: dict[str, dict[str, str]] = {}
    states: dict[str, dict[str, Any]] = {}
    for name in stored if hooked else ():
        if (owner := ancestor(name, hooked)) is not None:
            tensors.setdefault(owner, {})[name] = _inside(name, owner)
    for name, value in extra_states.items():
        if (owner := ancestor(name, hooked)) is not None:
            states.setdefault(owner, {})[_inside(name, owner)] = value
    names = [name for name in hooked if name in tensors or name in states]
    return tuple(Routine(name, tensors.get(name, {}), states.get(name, {})) for name in names)


def _inside(name: str, owner: str) -> str:
    """``name`` without the name of the sub-module ``owner``, which contains it."""
    return name[len(owner) + 1 :] if owner else name


def _missing(inventory: Inventory, layout: Layout, names: Collection[str]) -> tuple[str, ...]:
    """Those of ``names`` that the checkpoint lacks and a load needs: not if the same tensor is stored under another name."""
    if not names:
        return ()
    leaders = inventory.leaders
    filled = {leaders[name] for name in layout.stored if name in leaders}
    counters = {slot.name for slot in inventory.slots if counts_batches(slot)}
    missing = (name for name in names if name not in counters and leaders.get(name) not in filled)
    return tuple(sorted(name for name in missing if not layout.may_be_missing(name)))


def _mismatched(slots: Iterable[Slot], stored: Mapping[str, Located], matched: Collection[str]) -> dict[str, str]:
    """Those of ``matched`` whose shape on disk is another one; a lazy parameter has no shape, and is refused later."""
    mismatched = {}
    for slot in slots:
        if slot.name in matched and not is_lazy(slot.tensor):
            located, tensor = stored[slot.name], slot.tensor
            shape = torch_shape(located.dtype, located.shape)
            # torch's oldest scalars were saved with one dimension.
            if shape != tensor.shape and not (tensor.dim() == 0 and shape == (1,)):
                mismatched[slot.name] = f"{slot.name} {list(shape)} on disk, {list(tensor.shape)} in the module"
    return mismatched


def _destinations(
    inventory: Inventory, stored: Mapping[str, Located], in_place: Collection[str], owners: set[str]
) -> tuple[dict[str, str | None], tuple[tuple[str, str], ...]]:
    """`ModulePlan.destinations` and `ModulePlan.must_equal`. A tensor read in place goes before one that a routine fills."""
    first: dict[str, str] = {}  # by leader
    destinations: dict[str, str | None] = {}
    must_equal = []
    for slot in inventory.slots:
        if slot.name in in_place:
            name = first.setdefault(inventory.leaders[slot.name], slot.name)
            destinations.setdefault(name, None)
            if stored[name] is not stored[slot.name]:
                must_equal.append((name, slot.name))
    for slot in inventory.slots if owners else ():
        owner = ancestor(slot.name, owners) if slot.name in stored else None
        if owner is None:
            continue
        name = first.setdefault(inventory.leaders[slot.name], slot.name)
        if destinations.setdefault(name, owner) == owner:
            continue
        left, right = stored[name], stored[slot.name]
        if left is not right and left.shard and right.shard:
            must_equal.append((name, slot.name))
    return destinations, tuple(must_equal)


def _casts(inventory: Inventory, stored: Mapping[str, Located], destinations: Mapping[str, str | None]) -> Casts:
    tensors = inventory.tensors()
    in_place = (name for name, routine in destinations.items() if routine is None)
    dtypes = Counter((BY_NAME[stored[name].dtype].torch, tensors[name].dtype) for name in in_place)
    return {(have, want): number for (have, want), number in dtypes.items() if have != want}
