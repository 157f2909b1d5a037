"""Plans a load: which stored tensor fills which tensor of a module, and what differs. The plan is a value; nothing is read or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory import PLAIN_TYPES
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.disk_layout import Beside, DiskLayout, Join
from shardsave._loading.slots import Inventory, ancestor, counts_batches
from shardsave._storage.checkpoint import Located

#: The dtypes of one tensor on disk and in the module.
Dtypes = tuple[torch.dtype, torch.dtype]


class Routine(NamedTuple):
    """A sub-module that loads itself, by a routine of its own: hooks, overrides, extra state. ``name`` "" is the whole module.

    ``tensors``: name in the module → name inside the sub-module, for everything stored below its name. ``extra_state``: name inside
    the sub-module → extra state that is plain data.
    """

    name: str
    tensors: Mapping[str, str]
    extra_state: Mapping[str, Any]


@dataclass(frozen=True)
class ModulePlan:
    """Which stored tensor fills which tensor of a module, and how.

    ``stored``, ``joins``, ``beside``: from the layout. ``routines``: the sub-modules that load themselves, in module order. ``owned``:
    each name below one of them → the name of the sub-module. ``matched``: the other names that the module and the checkpoint have
    with the same shape → the stored tensor. ``destinations``: for each tensor that is filled, its first name → the sub-module that
    fills it; None: it is read in place. ``must_equal``: pairs of names that are one tensor in the module but two on disk.
    ``missing``, ``unexpected``: names, sorted. ``mismatched``: name → how the shapes differ; these tensors are not loaded. ``differing``:
    those of ``matched`` whose dtypes on disk and in the module differ → both. ``flags``: name → frozen, for the flags
    to restore; None: no flag is restored.
    """

    stored: Mapping[str, Located]
    joins: tuple[Join, ...]
    beside: tuple[Beside, ...]
    routines: tuple[Routine, ...]
    owned: Mapping[str, str]
    matched: Mapping[str, Located]
    destinations: Mapping[str, str | None]
    must_equal: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    differing: Mapping[str, Dtypes]
    flags: Mapping[str, bool] | None

    @cached_property
    def in_place(self) -> tuple[str, ...]:
        """One name for each tensor that is read straight into the module's memory."""
        return tuple([name for name, routine in self.destinations.items() if routine is None])

    @cached_property
    def routed(self) -> frozenset[str]:
        """The names of stored tensors that routines receive."""
        return frozenset(name for routine in self.routines for name in routine.tensors)

    @cached_property
    def reads(self) -> list[Located]:
        """The stored tensors that will be read."""
        routed = [name for routine in self.routines for name in routine.tensors]
        if not self.joins:
            in_place = map(self.matched.__getitem__, self.in_place)
            return [*map(self.stored.__getitem__, routed), *in_place, *(beside.located for beside in self.beside)]
        names = [*routed, *self.in_place]
        wanted = set(names)
        joined = {target for join in self.joins for target in join.targets}
        sources = [source for join in self.joins if not wanted.isdisjoint(join.targets) for source in join.sources]
        sources += [beside.located for beside in self.beside]
        return [*(self.stored[name] for name in names if name not in joined), *sources]

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Those of the missing names that the checkpoint knows as frozen: it is to be loaded onto a model that has them."""
        flags = self.flags or {}
        return tuple(name for name in self.missing if flags.get(name))

    def notes(self) -> tuple[str, ...]:
        """Which values are cast, and which stay, for the report."""
        in_place = self.in_place if self.differing else ()
        counts = Counter(self.differing[name] for name in in_place if name in self.differing)
        casts = [
            f"{number} cast from {stored} to {wanted}".replace("torch.", "") for (stored, wanted), number in counts.items()
        ]
        number = len(self.left_out)
        stay = f"{number} of the missing names were frozen and left out by the save; they keep the values that they had"
        return (*casts, *([stay] if number else []))


@gc_paused()
def plan_module(
    inventory: Inventory,
    layout: DiskLayout,
    *,
    flags: Mapping[str, bool] | None = None,
    extra_states: Mapping[str, Any] | None = None,
    doubtful: Collection[str] = (),
) -> ModulePlan:
    """Plans how the stored tensors of ``layout`` fill the module of ``inventory``.

    ``flags``: the flags to restore, by the names that the checkpoint records. ``extra_states``: name → extra state that is plain data.
    ``doubtful``: names that are never unexpected, because they come from third-party metadata that only looks like a record of ties.
    """
    stored, expected = layout.stored, inventory.expected
    routines = _routines(inventory, stored, extra_states or {})
    owned = _owned(inventory, stored, routines)
    left_out = {*owned, *[name for name, slot in inventory.slots.items() if not slot.saved]}
    match = _match(inventory, {name: t for name, t in stored.items() if name not in left_out} if left_out else stored)
    destinations, must_equal = _destinations(inventory, stored, match.matched, owned)
    in_both = len(match.matched) + len(match.mismatched)
    missing = expected - stored.keys() - owned.keys() if in_both < len(expected) else ()
    unexpected = stored.keys() - expected - owned.keys() - set(doubtful) if in_both < len(stored) else ()
    flags = layout.flags(flags) if flags is not None else None
    return ModulePlan(
        stored=stored,
        joins=tuple(layout.joins),
        beside=tuple(layout.beside),
        routines=routines,
        owned=owned,
        matched=match.matched,
        destinations=destinations,
        must_equal=must_equal,
        missing=_missing(inventory, layout, missing),
        unexpected=tuple(sorted(unexpected)),
        mismatched=match.mismatched,
        differing=match.differing,
        flags=flags if not flags or not match.mismatched else {n: f for n, f in flags.items() if n not in match.mismatched},
    )


@gc_paused()
def plan_again(plan: ModulePlan, inventory: Inventory) -> ModulePlan:
    """``plan`` for the tensors in ``inventory``, which was taken again because routines may have replaced other tensors."""
    match = _match(inventory, plan.matched)
    owned = _owned(inventory, plan.stored, plan.routines)
    destinations, must_equal = _destinations(inventory, plan.stored, match.matched, owned)
    return replace(
        plan,
        owned=owned,
        matched=match.matched,
        destinations=destinations,
        must_equal=must_equal,
        mismatched={**plan.mismatched, **match.mismatched},
        differing=match.differing,
    )


def _routines(inventory: Inventory, stored: Iterable[str], extra_states: Mapping[str, Any]) -> tuple[Routine, ...]:
    """The sub-modules that load themselves and for which the checkpoint has something.

    A routine receives everything below its name, also names that the module does not expect: such routines rename, drop and add names.
    """
    self_loading = inventory.self_loading
    tensors: dict[str, dict[str, str]] = {}
    states: dict[str, dict[str, Any]] = {}
    for name in stored if self_loading else ():
        if (owner := ancestor(name, self_loading)) is not None:
            tensors.setdefault(owner, {})[name] = _inside(name, owner)
    for name, value in extra_states.items():
        if (owner := ancestor(name, self_loading)) is not None:
            states.setdefault(owner, {})[_inside(name, owner)] = value
    names = [name for name in self_loading if name in tensors or name in states]
    return tuple(Routine(name, tensors.get(name, {}), states.get(name, {})) for name in names)


def _owned(inventory: Inventory, stored: Mapping[str, Located], routines: Iterable[Routine]) -> dict[str, str]:
    """Each name, in the module or in ``stored``, that is below one of ``routines`` → the name of that routine."""
    owners = {routine.name: routine for routine in routines}
    names = {**inventory.slots, **dict.fromkeys(inventory.expected), **stored} if owners else {}
    owned = {name: ancestor(name, owners) for name in names}
    return {name: owner for name, owner in owned.items() if owner is not None}


def _inside(name: str, owner: str) -> str:
    """``name`` without the name of the sub-module ``owner``, which contains it."""
    return name[len(owner) + 1 :] if owner else name


def _missing(inventory: Inventory, layout: DiskLayout, names: Collection[str]) -> tuple[str, ...]:
    """Those of ``names`` that the checkpoint lacks and a load needs. A tensor that is stored under another of its names is not missing."""
    if not names:
        return ()
    filled = {inventory.leader(name) for name in layout.stored if name in inventory.slots}
    counters = {name for name, slot in inventory.slots.items() if counts_batches(slot)}
    missing = (name for name in names if name not in counters and inventory.leader(name) not in filled)
    return tuple(sorted(name for name in missing if not layout.may_be_missing(name)))


class _Match(NamedTuple):
    """The members of `ModulePlan` with these names."""

    matched: dict[str, Located]
    mismatched: dict[str, str]
    differing: dict[str, Dtypes]


def _match(inventory: Inventory, stored: Mapping[str, Located]) -> _Match:
    """Compares the tensors of the module with those of the same names in ``stored``."""
    dtypes = {dtype: BY_NAME[dtype].torch for dtype in {located.dtype for located in stored.values()}}
    matched, mismatched, differing = match = _Match({}, {}, {})
    for name, slot in inventory.slots.items():
        if (located := stored.get(name)) is None:
            continue
        tensor = slot.tensor
        if type(tensor) in PLAIN_TYPES or not is_lazy(tensor):  # lazy parameters have no shape, and the checks refuse them
            shape = torch_shape(located.dtype, located.shape)
            # torch's oldest scalars were saved with one dimension.
            if shape != tensor.shape and not (tensor.dim() == 0 and shape == (1,)):
                mismatched[name] = f"{name} {list(shape)} on disk, {list(tensor.shape)} in the module"
                continue
        matched[name] = located
        if (on_disk := dtypes[located.dtype]) != tensor.dtype:
            differing[name] = on_disk, tensor.dtype
    return match


def _destinations(
    inventory: Inventory, stored: Mapping[str, Located], matched: Mapping[str, Located], owned: Mapping[str, str]
) -> tuple[dict[str, str | None], tuple[tuple[str, str], ...]]:
    """`ModulePlan.destinations` and `ModulePlan.must_equal`. A tensor with names in ``matched`` and in ``owned`` is read in place."""
    if not inventory.leaders and not owned:  # each name is another tensor
        return dict.fromkeys(matched), ()
    first: dict[str, str] = {}  # by leader
    destinations: dict[str, str | None] = {}
    must_equal = []
    for name, located in matched.items():
        same_tensor = first.setdefault(inventory.leader(name), name)
        destinations.setdefault(same_tensor, None)
        if matched[same_tensor] is not located:
            must_equal.append((same_tensor, name))
    for name in inventory.slots if owned else ():
        if name not in owned or name not in stored:
            continue
        same_tensor = first.setdefault(inventory.leader(name), name)
        if destinations.setdefault(same_tensor, owned[name]) == owned[name]:
            continue
        left, right = stored[same_tensor], stored[name]
        if left is not right and left.shard and right.shard:
            must_equal.append((same_tensor, name))
    return destinations, tuple(must_equal)
