"""Restores the freeze flags of a loaded module: sets ``requires_grad`` of its parameters to what was saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from shardsave._common.words import some
from shardsave._loading.slots import Inventory
from shardsave._state.wrappers import Names


class RestoredFlags(NamedTuple):
    """``frozen``: how many parameters are frozen now; None if flags were not restored. ``now_frozen``, ``now_trainable``: the names of
    those that had the other flag before. ``notes``: which flags were not restored, for the report."""

    frozen: int | None
    now_frozen: tuple[str, ...] = ()
    now_trainable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        return len(self.now_frozen) + len(self.now_trainable)


def restore_flags(
    parameters: Iterable[tuple[str, torch.Tensor]],
    flags: Mapping[str, bool] | None,
    routed: Sequence[str] = (),
    origins: Mapping[str, Sequence[str]] | None = None,
) -> RestoredFlags:
    """Sets the flags of floating-point ``parameters`` (name, parameter) to ``flags`` (name → frozen).

    ``routed``: the names of stored tensors that sub-modules loaded themselves. ``origins``: the name of a parameter that such a
    sub-module filled → the names of the stored tensors that it was made of; it is frozen if all of these with a flag are.
    If one parameter has several names with different flags, because they were saved as several parameters, one trainable name makes
    it trainable.
    """
    if flags is None:
        return RestoredFlags(None)
    origins = origins or {}
    followed: set[str] = set()
    with_flag: dict[bool, set[int]] = {False: set(), True: set()}  # the ids of parameters
    changing: dict[bool, dict[int, tuple[str, torch.Tensor]]] = {False: {}, True: {}}
    for name, parameter in parameters:
        frozen = flags.get(name)
        if routed or origins:
            sources = origins.get(name, (name,))
            followed.update(sources)
            if name not in sources:
                known = [flags[source] for source in sources if source in flags]
                frozen = all(known) if known else None
        if frozen is not None and ((dtype := parameter.dtype).is_floating_point or dtype.is_complex):
            with_flag[frozen].add(id(parameter))
            if parameter.requires_grad == frozen:
                changing[frozen].setdefault(id(parameter), (name, parameter))
    for number in with_flag[False] & with_flag[True]:
        with_flag[True].remove(number)
        changing[True].pop(number, None)
    now_trainable = _set_flags(changing[False].values(), requires_grad=True)
    now_frozen = _set_flags(changing[True].values(), requires_grad=False)
    lost = [name for name in routed if name in flags and name not in followed]
    notes = []
    if lost:
        notes = [
            f"the flags of {some(lost)} were not restored: the module loads these itself, and no parameter is known to hold them"
        ]
    return RestoredFlags(len(with_flag[True]), now_frozen, now_trainable, tuple(notes))


def _set_flags(parameters: Iterable[tuple[str, torch.Tensor]], *, requires_grad: bool) -> tuple[str, ...]:
    """Returns the names of ``parameters``."""
    names = []
    for name, parameter in parameters:
        with torch.inference_mode(parameter.is_inference()):  # outside inference mode, an inference tensor refuses the flag
            parameter.requires_grad_(requires_grad)
        names.append(name)
    return tuple(names)


def named_parameters(inventory: Inventory, routines: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter by every name, and by the names that hooks give it on disk; ``routines``: the sub-modules that load themselves."""
    for name, slot in inventory.slots.items():
        if not slot.is_buffer:
            yield name, slot.owner._parameters[slot.attribute]  # type: ignore[misc]  # the slot's tensor may be offloaded
    for routine in routines:
        module = inventory.self_loading[routine]
        names = Names.of(module)
        for wrapped, value in module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                inside = names.plain(wrapped)
                yield f"{routine}.{inside}" if routine else inside, value
