"""Fitting a checkpoint into a live module: what goes where, and what cannot, before a single tensor is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from shardsave._checkpoint import Located
from shardsave._collector import collector_still
from shardsave._dtypes import BY_NAME, torch_shape
from shardsave._fillable import check_fillable, check_plain, check_shaped, refuse_overlaps
from shardsave._memory import address
from shardsave._slots import Slot, ancestor, counts_batches, expected_names, hooked_modules, leaders, slots, sub_modules
from shardsave._state import Names, refuse_sharded, unwrap
from shardsave.errors import IncompatibleCheckpointError, ShardSaveError


class Join(NamedTuple):
    """Tensors of the module that lie on disk in another layout, as several parts or as parts of another.

    ``targets``: their names in the module. ``sources``: what is read for them. ``convert`` makes the former of the latter.
    """

    targets: tuple[str, ...]
    sources: tuple[Located, ...]
    convert: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]


class Joins(Protocol):
    """All joins of a module, and where the sources of each lie in the module's tensors, where they do."""

    joins: list[Join]

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]: ...


class Group(NamedTuple):
    """Tensors that are read together: (stored tensor, destination). `finish` is called once they are filled.

    ``in_place``: the destinations are the module's own; else they are copies that `finish` passes on. It gives what that finds
    missing and unexpected.
    """

    targets: tuple[tuple[Located, torch.Tensor], ...]
    in_place: bool = True
    finish: Callable[[bool], tuple[list[str], list[str]]] = lambda strict: ([], [])


class Fit:
    """How a checkpoint goes into a module. Nothing has been changed until `materialise` is called."""

    def __init__(
        self, module: nn.Module, device: torch.device | None, stored: Mapping[str, Located], joins: Joins | None = None
    ) -> None:
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.mismatched: tuple[str, ...] = ()
        self._module = module
        self._device = device
        self._stored = stored
        self._joins = joins
        self._sub_modules = sub_modules(module)
        self._slots = slots(self._sub_modules)
        self._leaders = leaders(self._slots)  # every name → the first name with the same memory
        self._direct: list[str] = []
        self._hooked: list[tuple[str, nn.Module, dict[str, str]]] = []
        self._extra_states: Mapping[str, Any] = {}
        self._left_alone: set[str] = set()
        self._done: list[torch.Tensor] = []
        self.look_again: Callable[[bool], tuple[list[str], list[str]]] = lambda strict: ([], [])

    @property
    def _names(self) -> list[str]:
        """The names in the module whose bytes are read."""
        return [*(name for _, _, own in self._hooked for name in own), *self._direct]

    @property
    def reads(self) -> list[Located]:
        """The stored tensors that are read."""
        names = self._names
        if self._joins is None:
            return [self._stored[name] for name in names]
        joins, wanted = self._joins.joins, set(names)
        joined = {target for join in joins for target in join.targets}
        parts = [source for join in joins if not wanted.isdisjoint(join.targets) for source in join.sources]
        return [*(self._stored[name] for name in names if name not in joined), *parts]

    def materialise(self, names: Iterable[str] | None = None) -> None:
        """Puts real memory behind meta tensors, and moves to the device asked for what is elsewhere; ties are kept.

        ``names``: what is going to be filled; everything that is read by default.
        """
        moving = [slot for slot in self._slots if not self.stays(slot.tensor)]
        if not moving:
            return
        owners = {name for name, _, _ in self._hooked}
        filled = {self._leaders[name] for name in (self._names if names is None else names) if name in self._leaders}
        theirs = {self._leaders[slot.name] for slot in self._slots if ancestor(slot.name, owners) is not None}
        memory: dict[str, torch.Tensor] = {}
        parameters: dict[int, nn.Parameter] = {}
        # Parameters made in inference mode could never be trained: the caller's mode must not get into the module.
        with torch.inference_mode(False), torch.no_grad():
            for slot in moving:
                tensor, leader = slot.tensor, self._leaders[slot.name]
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
        self._slots = slots(self._sub_modules)

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
        current = {slot.name: slot.tensor for slot in self._slots}
        given: dict[str, torch.Tensor] = {}
        theirs = {name for _, _, own in self._hooked for name in own}
        for join in self._joins.joins if self._joins is not None and theirs else []:
            if not theirs.isdisjoint(join.targets):
                yield self._join_apart(join, current, given)
        for owner_name, owner, own in self._hooked:
            start = f"{owner_name}." if owner_name else ""
            extra = {n[len(start) :]: value for n, value in self._extra_states.items() if n.startswith(start)}
            yield _give(owner_name, owner, own, self._stored, given, extra)
        if self._hooked and self._direct:
            yield Group((), False, self.look_again)
        with collector_still():
            if self._hooked:
                current = {slot.name: slot.tensor for slot in self._slots}
            direct, apart = self._join_in_place(current)
        while apart:
            join = apart.pop(0)
            if theirs.isdisjoint(join.targets):
                yield self._join_apart(join, current, given)
        yield Group(tuple(direct))

    def _join_in_place(self, current: Mapping[str, torch.Tensor]) -> tuple[list[tuple[Located, torch.Tensor]], list[Join]]:
        """What goes straight into the module's memory, and the joins that do not."""
        self._done = [current[name].detach() for name in self._direct]
        if self._joins is None:
            return [*zip(map(self._stored.__getitem__, self._direct), self._done)], []
        joins = self._joins.joins
        targets = {target for join in joins for target in join.targets}
        direct = [(self._stored[name], own) for name, own in zip(self._direct, self._done) if name not in targets]
        tensors = {name: current[name].detach() for name in targets if name in current}
        views = self._joins.views(tensors) if tensors else [None] * len(joins)
        apart, straight, wanted = [], set(self._direct), set(self._names)
        for join, inside in zip(joins, views):
            if inside is not None and straight.issuperset(join.targets):
                direct += zip(join.sources, inside)
            elif not wanted.isdisjoint(join.targets):
                apart.append(join)
        return direct, apart

    def _join_apart(self, join: Join, current: Mapping[str, torch.Tensor], given: dict[str, torch.Tensor]) -> Group:
        """Copies of all that is joined; what they make goes into the module, or is kept for a routine of its own."""
        copies = [_copy_of(source) for source in join.sources]
        straight, theirs = set(self._direct), {name for _, _, own in self._hooked for name in own}

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
            if frozen is None or name in self._left_alone:
                continue
            if parameter.is_floating_point() or parameter.is_complex():
                key = id(parameter)
                parameters[key] = parameter
                wanted[key] = frozen and wanted.get(key, True)
        for parameter, frozen in zip(parameters.values(), wanted.values()):
            if parameter.requires_grad == frozen:
                with torch.inference_mode(parameter.is_inference()):  # outside, an inference tensor refuses the flag
                    parameter.requires_grad_(not frozen)
        return sum(wanted.values())

    def _named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter by every name that it has, and by those that hooks of its sub-module give it on disk."""
        # A routine of a sub-module's own may have put others in the place of those that were there.
        for slot in slots(sub_modules(self._module)) if self._hooked else self._slots:
            if not slot.is_buffer:
                yield slot.name, slot.tensor
        for name, owner, _ in self._hooked:
            names = Names.of(owner)
            for own_name, value in owner.state_dict(keep_vars=True).items():
                if isinstance(value, nn.Parameter):
                    plain = names.plain(own_name)
                    yield f"{name}.{plain}" if name else plain, value


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
) -> Fit:
    """Finds out what of ``stored`` (name → stored tensor, tied names too) goes where in ``module``; changes nothing.

    ``equal`` tells whether two stored tensors hold the same bytes, ``optional`` which names may be missing; ``joins`` makes those of
    ``stored`` that are no file's; ``extra_states``: those that are no tensors. Raises IncompatibleCheckpointError and
    UnsupportedTensorError with the module unchanged.
    """
    module = unwrap(module)
    refuse_sharded(module, "fill", "the module is unchanged")
    fit = Fit(module, device, stored, joins)
    fit._extra_states = extra_states
    expected = expected_names(fit._sub_modules, fit._slots)
    theirs = _give_to_owners(fit, expected)
    fit.unexpected = tuple(sorted(stored.keys() - expected - theirs))
    if missing := expected - stored.keys() - theirs:
        there = {fit._leaders[name] for name in stored if name in fit._leaders}
        missing -= {slot.name for slot in fit._slots if counts_batches(slot)}
        fit.missing = tuple(sorted(name for name in missing if fit._leaders.get(name) not in there and not optional(name)))
    for slot in fit._slots:
        if slot.name in theirs:
            check_plain(slot, where)
    straight = (stored.keys() & expected) - theirs
    usable = [slot for slot in fit._slots if slot.name in straight]
    fit.mismatched = _leave_mismatched(fit, usable, where)
    if strict and (fit.missing or fit.unexpected or fit.mismatched):
        _refuse_difference(fit, where)
    _choose_direct(fit, usable, where, equal)
    _refuse_meta_left_over(fit._slots, expected, where)
    fit.look_again = lambda strict: _choose_again(fit, straight, where, equal)
    return fit


def _leave_mismatched(fit: Fit, usable: Sequence[Slot], where: str) -> tuple[str, ...]:
    """Tells which of ``usable``, those without a loading routine, have another shape on disk; they are left alone."""
    mismatched = []
    for slot in usable:
        check_shaped(slot, where)
        t, tensor = fit._stored[slot.name], slot.tensor
        shape = torch_shape(t.dtype, t.shape)
        if shape != tensor.shape and not (tensor.dim() == 0 and shape == (1,)):
            mismatched.append(f"{slot.name} {list(shape)} on disk, {list(tensor.shape)} in the module")
            fit._left_alone.add(slot.name)
    return tuple(sorted(mismatched))


def _choose_direct(fit: Fit, usable: Sequence[Slot], where: str, equal: Callable[[Located, Located], bool]) -> None:
    """Chooses what is filled straight in: of the names of ``usable`` that are one tensor the first."""
    stored = fit._stored
    first: dict[str, Slot] = {}
    dtypes = {dtype: BY_NAME[dtype].torch for dtype in {t.dtype for t in stored.values()}}
    for slot in usable:
        if slot.name in fit._left_alone:
            continue
        check_fillable(slot, dtypes[stored[slot.name].dtype], where)
        leader = first.setdefault(fit._leaders[slot.name], slot).name
        if leader != slot.name and stored[leader] is not stored[slot.name] and not equal(stored[leader], stored[slot.name]):
            _refuse_tie(leader, slot.name, where)
    theirs = _first_of_owners(fit, first, where, equal)
    owners = {slot.name: owner for slot, owner in theirs}
    apart = (*first.values(), *(slot for slot, _ in theirs if address(slot.tensor)))
    refuse_overlaps((slot for slot in apart if fit.stays(slot.tensor)), owners, where)
    fit._direct = [slot.name for slot in first.values()]


def _choose_again(
    fit: Fit, straight: set[str], where: str, equal: Callable[[Located, Located], bool]
) -> tuple[list[str], list[str]]:
    """Once loading routines have run: what they put in the place of other sub-modules' tensors is what is filled.

    Raises IncompatibleCheckpointError where that cannot be filled, or where they took a tensor away.
    """
    fit._sub_modules = sub_modules(fit._module)
    fit._slots = slots(fit._sub_modules)
    fit._leaders = leaders(fit._slots)
    usable = [slot for slot in fit._slots if slot.name in straight]
    before = set(fit._left_alone)
    lost = sorted(set(fit._direct) - fit._leaders.keys())
    try:
        changed = _leave_mismatched(fit, usable, where) if not lost else ()
        if lost or fit._left_alone != before:
            name = min(lost or fit._left_alone - before)
            found = f"{name} is not there any more" if lost else next(c for c in changed if c.startswith(f"{name} ["))
            raise IncompatibleCheckpointError(f"cannot load {where}: the module's names and shapes were expected, {found}")
        _choose_direct(fit, usable, where, equal)
    except ShardSaveError as error:
        raise IncompatibleCheckpointError(
            f"{str(error).removesuffix('; the module is unchanged')}; the loading routine of another sub-module changed that"
        ) from error
    fit.materialise(fit._direct)
    return [], []


def _first_of_owners(
    fit: Fit, first: Mapping[str, Slot], where: str, equal: Callable[[Located, Located], bool]
) -> list[tuple[Slot, str]]:
    """What sub-modules with loading routines fill, with the name of each; of tensors that are one the first, and not those of ``first``.

    Raises IncompatibleCheckpointError where one is also filled by another, with another value. Only a routine whose state dict has that
    very tensor: others change what they are given, and may come to the same value.
    """
    owners = {name: owner for name, owner, own in fit._hooked}
    if not owners:
        return []
    seen: dict[str, tuple[Slot, str | None]] = {leader: (slot, None) for leader, slot in first.items()}
    found = []
    for slot in fit._slots:
        owner = ancestor(slot.name, owners) if slot.name in fit._stored else None
        if owner is None:
            continue
        other, others_owner = seen.setdefault(fit._leaders[slot.name], (slot, owner))
        if other is slot:
            found.append((slot, owner))
            continue
        left, right = fit._stored[other.name], fit._stored[slot.name]
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
    hooked = hooked_modules(fit._sub_modules)
    if not hooked:
        return set()
    own: dict[str, dict[str, str]] = {}
    for name in fit._stored:
        owner_name = ancestor(name, hooked)
        if owner_name is not None:
            own.setdefault(owner_name, {})[name] = name[len(owner_name) + 1 :] if owner_name else name
    for name in fit._extra_states:
        owner_name = ancestor(name, hooked)
        if owner_name is not None:
            own.setdefault(owner_name, {})
    fit._hooked = [(name, owner, own[name]) for name, owner in hooked.items() if name in own]
    return {name for name in expected | fit._stored.keys() if ancestor(name, own) is not None}


def _give(
    owner_name: str,
    owner: nn.Module,
    own: Mapping[str, str],
    stored: Mapping[str, Located],
    given: dict[str, torch.Tensor],
    extra: Mapping[str, Any],
) -> Group:
    """Copies for a sub-module with a loading routine of its own, which gets them together with what was joined for it, and ``extra``."""
    ready = {inner: given.pop(name) for name, inner in own.items() if name in given}
    copies = {inner: (stored[name], _copy_of(stored[name])) for name, inner in own.items() if inner not in ready}

    def finish(strict: bool) -> tuple[list[str], list[str]]:
        names = Names.of(owner)
        state: dict[str, Any] = {
            names.wrapped(inner): copies[inner][1] if inner in copies else ready[inner] for inner in own.values()
        }
        state.update({names.wrapped(inner): value for inner, value in extra.items()})
        inference = any(not is_lazy(slot.tensor) and slot.tensor.is_inference() for slot in slots(sub_modules(owner)))
        try:
            with torch.inference_mode(inference):
                answer = owner.load_state_dict(state, strict=strict)
        except Exception as error:
            raise IncompatibleCheckpointError(
                f"cannot load {owner_name or type(owner).__name__!r}: its own load_state_dict was expected to take "
                f"what was saved, it raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        start = f"{owner_name}." if owner_name else ""
        missing, unexpected = getattr(answer, "missing_keys", ()), getattr(answer, "unexpected_keys", ())
        return [start + names.plain(name) for name in missing], [start + names.plain(name) for name in unexpected]

    return Group(tuple(copies.values()), False, finish)


def _copy_of(stored: Located) -> torch.Tensor:
    """New memory for a stored tensor, on the CPU wherever torch makes tensors by default."""
    return torch.empty(torch_shape(stored.dtype, stored.shape), dtype=BY_NAME[stored.dtype].torch, device="cpu")


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


def _same_device(left: torch.device, right: torch.device) -> bool:
    if left.type != right.type or left.type == "cpu":
        return left.type == right.type
    if right.index is None and left.type == "cuda":
        return left.index == torch.cuda.current_device()
    return left.index == right.index or right.index is None
