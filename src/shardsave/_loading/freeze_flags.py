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
    """``frozen``: how many parameters are frozen now; None if flags were not restored. ``changed``: how many had another flag before.
    ``notes``: which flags were not restored, for the report."""

    frozen: int | None
    changed: int
    notes: tuple[str, ...] = ()


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
        return RestoredFlags(None, 0)
    origins = origins or {}
    followed: set[str] = set()
    with_flag: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for name, parameter in parameters:
        frozen = flags.get(name)
        if routed or origins:
            sources = origins.get(name, (name,))
            followed.update(sources)
            if name not in sources:
                known = [flags[source] for source in sources if source in flags]
                frozen = all(known) if known else None
        if frozen is not None and ((dtype := parameter.dtype).is_floating_point or dtype.is_complex):
            with_flag[frozen].append(parameter)
    frozen_by_id = {id(parameter): parameter for parameter in with_flag[True]}
    if frozen_by_id:
        for parameter in with_flag[False]:
            frozen_by_id.pop(id(parameter), None)
    changing = {id(parameter): parameter for parameter in with_flag[False] if not parameter.requires_grad}
    changing.update((number, parameter) for number, parameter in frozen_by_id.items() if parameter.requires_grad)
    for number, parameter in changing.items():
        with torch.inference_mode(parameter.is_inference()):  # outside inference mode, an inference tensor refuses the flag
            parameter.requires_grad_(number not in frozen_by_id)
    lost = [name for name in routed if name in flags and name not in followed]
    notes = []
    if lost:
        notes = [
            f"the flags of {some(lost)} were not restored: the module loads these itself, and no parameter is known to hold them"
        ]
    return RestoredFlags(len(frozen_by_id), len(changing), tuple(notes))


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
