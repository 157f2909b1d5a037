"""Fitting a checkpoint into a live module: what goes where, and what cannot, before a single tensor is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from shardsave._common.gc_pause import collector_still
from shardsave._common.memory import address
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.fill_checks import check_fillable, check_plain, check_shaped, refuse_overlaps
from shardsave._loading.fill_groups import Joins
from shardsave._loading.fill_module import Fit
from shardsave._loading.slots import Slot, ancestor, counts_batches, expected_names, hooked_modules, leaders, slots, sub_modules
from shardsave._state.wrappers import Names, refuse_sharded, unwrap
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError, ShardSaveError


@collector_still()
def fit_module(
    module: nn.Module,
    stored: Mapping[str, Located],
    *,
    device: torch.device | None,
    strict: bool,
    equal: Callable[[Located, Located], bool],
    where: str,
    joins: Joins | None = None,
    optional: Callable[[str], bool] = lambda name: False,
    extra_states: Mapping[str, Any] = {},
    told_ties: Collection[str] = (),
) -> Fit:
    """Finds out what of ``stored`` (name → stored tensor, tied names too) goes where in ``module``; changes nothing.

    ``equal`` tells whether two stored tensors hold the same bytes, ``optional`` which names may be missing; ``joins`` makes those of
    ``stored`` that are no file's; ``extra_states``: those that are no tensors; ``told_ties``: names that metadata of others seem to tell
    of, and that may be none. Raises IncompatibleCheckpointError and UnsupportedTensorError with the module unchanged.
    """
    module = unwrap(module)
    refuse_sharded(module, "fill", "the module is unchanged")
    fit = Fit(module, device, stored, joins)
    if len(fit.leaders) != len(fit.slots):
        twice, _ = Counter(slot.name for slot in fit.slots).most_common(1)[0]
        raise IncompatibleCheckpointError(
            f"cannot load {where}: tensors with names of their own were expected in the module, two are {twice!r} without the names of "
            f"wrappers; the module is unchanged"
        )
    fit.extra_states = extra_states
    expected = expected_names(fit.sub_modules, fit.slots)
    theirs = _give_to_owners(fit, expected)
    fit.unexpected = tuple(sorted(stored.keys() - expected - theirs - set(told_ties)))
    if missing := expected - stored.keys() - theirs:
        there = {fit.leaders[name] for name in stored if name in fit.leaders}
        missing -= {slot.name for slot in fit.slots if counts_batches(slot)}
        fit.missing = tuple(sorted(name for name in missing if fit.leaders.get(name) not in there and not optional(name)))
    for slot in fit.slots:
        if slot.name in theirs:
            check_plain(slot, where)
    straight = (stored.keys() & expected) - theirs
    usable = [slot for slot in fit.slots if slot.name in straight]
    fit.mismatched = _leave_mismatched(fit, usable, where)
    if strict and (fit.missing or fit.unexpected or fit.mismatched):
        _refuse_difference(fit, where)
    _choose_direct(fit, usable, where, equal)
    _refuse_meta_left_over(fit.slots, expected, where)
    fit.look_again = lambda strict: _choose_again(fit, straight, where, equal)
    return fit


def _leave_mismatched(fit: Fit, usable: Sequence[Slot], where: str) -> tuple[str, ...]:
    """Tells which of ``usable``, those without a loading routine, have another shape on disk; they are left alone."""
    mismatched = []
    for slot in usable:
        check_shaped(slot, where)
        t, tensor = fit.stored[slot.name], slot.tensor
        shape = torch_shape(t.dtype, t.shape)
        if shape != tensor.shape and not (tensor.dim() == 0 and shape == (1,)):
            mismatched.append(f"{slot.name} {list(shape)} on disk, {list(tensor.shape)} in the module")
            fit.left_alone.add(slot.name)
    return tuple(sorted(mismatched))


def _choose_direct(fit: Fit, usable: Sequence[Slot], where: str, equal: Callable[[Located, Located], bool]) -> None:
    """Chooses what is filled straight in: of the names of ``usable`` that are one tensor the first."""
    stored = fit.stored
    first: dict[str, Slot] = {}
    dtypes = {dtype: BY_NAME[dtype].torch for dtype in {t.dtype for t in stored.values()}}
    for slot in usable:
        if slot.name in fit.left_alone:
            continue
        check_fillable(slot, dtypes[stored[slot.name].dtype], where)
        leader = first.setdefault(fit.leaders[slot.name], slot).name
        if leader != slot.name and stored[leader] is not stored[slot.name] and not equal(stored[leader], stored[slot.name]):
            _refuse_tie(leader, slot.name, where)
    theirs = _first_of_owners(fit, first, where, equal)
    owners = {slot.name: owner for slot, owner in theirs}
    apart = (*first.values(), *(slot for slot, _ in theirs if address(slot.tensor)))
    refuse_overlaps((slot for slot in apart if fit.stays(slot.tensor)), owners, where)
    fit.direct = [slot.name for slot in first.values()]


def _choose_again(
    fit: Fit, straight: set[str], where: str, equal: Callable[[Located, Located], bool]
) -> tuple[list[str], list[str]]:
    """Once loading routines have run: what they put in the place of other sub-modules' tensors is what is filled.

    Raises IncompatibleCheckpointError where that cannot be filled, or where they took a tensor away.
    """
    fit.sub_modules = sub_modules(fit.module)
    fit.slots = slots(fit.sub_modules)
    fit.leaders = leaders(fit.slots)
    usable = [slot for slot in fit.slots if slot.name in straight]
    before = set(fit.left_alone)
    lost = sorted(set(fit.direct) - fit.leaders.keys())
    try:
        changed = _leave_mismatched(fit, usable, where) if not lost else ()
        if lost or fit.left_alone != before:
            name = min(lost or fit.left_alone - before)
            found = f"{name} is not there any more" if lost else next(c for c in changed if c.startswith(f"{name} ["))
            raise IncompatibleCheckpointError(f"cannot load {where}: the module's names and shapes were expected, {found}")
        _choose_direct(fit, usable, where, equal)
    except ShardSaveError as error:
        raise IncompatibleCheckpointError(
            f"{str(error).removesuffix('; the module is unchanged')}; the loading routine of another sub-module changed that"
        ) from error
    fit.materialise(fit.direct)
    return [], []


def _first_of_owners(
    fit: Fit, first: Mapping[str, Slot], where: str, equal: Callable[[Located, Located], bool]
) -> list[tuple[Slot, str]]:
    """What sub-modules with loading routines fill, with the name of each; of tensors that are one the first, and not those of ``first``.

    Raises IncompatibleCheckpointError where one is also filled by another, with another value. Only a routine whose state dict has that
    very tensor: others change what they are given, and may come to the same value.
    """
    owners = {name: owner for name, owner, own in fit.hooked}
    if not owners:
        return []
    seen: dict[str, tuple[Slot, str | None]] = {leader: (slot, None) for leader, slot in first.items()}
    found = []
    for slot in fit.slots:
        owner = ancestor(slot.name, owners) if slot.name in fit.stored else None
        if owner is None:
            continue
        other, others_owner = seen.setdefault(fit.leaders[slot.name], (slot, owner))
        if other is slot:
            found.append((slot, owner))
            continue
        left, right = fit.stored[other.name], fit.stored[slot.name]
        if owner == others_owner or left is right or not (left.shard and right.shard) or equal(left, right):
            continue
        if all(_saves_itself(s, name, owners) for s, name in ((slot, owner), (other, others_owner))):
            _refuse_tie(other.name, slot.name, where)
    return found


def _saves_itself(slot: Slot, owner_name: str | None, owners: Mapping[str, nn.Module]) -> bool:
    """Whether the state dict of the sub-module with a loading routine, where there is one, has the tensor of ``slot`` as it is."""
    if owner_name is None:
        return True
    inner = slot.name[len(owner_name) + 1 :] if owner_name else slot.name
    names = Names.of(owners[owner_name])
    return any(
        names.plain(name) == inner and value is slot.tensor
        for name, value in owners[owner_name].state_dict(keep_vars=True).items()
    )


def _refuse_tie(left: str, right: str, where: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot load {where}: {left!r} and {right!r} are one tensor in the module and were expected to be equal on "
        f"disk, they differ; the module is unchanged"
    )


def _give_to_owners(fit: Fit, expected: set[str]) -> set[str]:
    """Gives each sub-module with a loading routine of its own all that is stored under its name; the names that are theirs.

    Also what the module does not expect: such routines rename, drop and make up names. One that gets nothing has no say.
    """
    hooked = hooked_modules(fit.sub_modules)
    if not hooked:
        return set()
    own: dict[str, dict[str, str]] = {}
    for name in fit.stored:
        owner_name = ancestor(name, hooked)
        if owner_name is not None:
            own.setdefault(owner_name, {})[name] = name[len(owner_name) + 1 :] if owner_name else name
    for name in fit.extra_states:
        owner_name = ancestor(name, hooked)
        if owner_name is not None:
            own.setdefault(owner_name, {})
    fit.hooked = [(name, owner, own[name]) for name, owner in hooked.items() if name in own]
    return {name for name in expected | fit.stored.keys() if ancestor(name, own) is not None}


def _refuse_meta_left_over(of: list[Slot], expected: set[str], where: str) -> None:
    left = [slot.name for slot in of if slot.is_buffer and slot.tensor.is_meta and slot.name not in expected]
    if left:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: buffers with data were expected, these are not saved and on the meta device: {_listed(left)}; "
            f"give them values first; the module is unchanged"
        )


def _refuse_difference(fit: Fit, where: str) -> NoReturn:
    differences = (
        ("missing from the checkpoint", fit.missing),
        ("not in the module", fit.unexpected),
        ("mismatched", fit.mismatched),
    )
    parts = [f"{len(names)} {words}: {_listed(names)}" for words, names in differences if names]
    hint = ""
    if any(name.startswith(".") for name in fit.unexpected):
        hint = "; a name begins with a dot where the prefix ends without its own: end it with one, as in 'encoder.'"
    raise IncompatibleCheckpointError(
        f"cannot load {where}: the module's names and shapes were expected, there are {'; '.join(parts)}{hint}; the module is unchanged"
    )


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
