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
    routed: Iterable[str] = (),
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
    by_id: dict[int, torch.Tensor] = {}
    wanted: dict[int, bool] = {}
    for name, parameter in parameters:
        sources = origins.get(name, (name,))
        followed.update(sources)
        known = [flags[source] for source in ([name] if name in sources else sources) if source in flags]
        frozen = all(known) if known else None
        if frozen is not None and (parameter.is_floating_point() or parameter.is_complex()):
            by_id[id(parameter)] = parameter
            wanted[id(parameter)] = frozen and wanted.get(id(parameter), True)
    changing = [key for key, frozen in wanted.items() if by_id[key].requires_grad == frozen]
    for key in changing:
        with torch.inference_mode(by_id[key].is_inference()):  # outside inference mode, an inference tensor refuses the flag
            by_id[key].requires_grad_(not wanted[key])
    lost = [name for name in routed if name in flags and name not in followed]
    notes = []
    if lost:
        notes = [
            f"the flags of {some(lost)} were not restored: the module loads these itself, and no parameter is known to hold them"
        ]
    return RestoredFlags(sum(wanted.values()), len(changing), tuple(notes))


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
