"""Learning-rate schedulers hold lists with a value for each group of their optimizer: puts these into the order of other groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardsave._training.kinds import inner

#: The members of a scheduler's state that are lists with one value for each group.
_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def arrange(scheduler: Any, state: Any, orders: Mapping[int, tuple[Sequence[int | None], int]], path: str) -> list[str]:
    """Changes ``state``, which the scheduler will load, for the groups that its optimizer has now. Returns notes.

    ``orders``: id of an optimizer → for each of its groups, the saved group that it continues (None: there is none), and how many
    groups were saved.
    """
    scheduler = inner(scheduler)
    if not isinstance(state, dict):
        return []
    notes = []
    parts = state.get("_schedulers")
    own_parts = getattr(scheduler, "_schedulers", None)
    if isinstance(parts, list) and isinstance(own_parts, (list, tuple)):
        for at, (own_part, part) in enumerate(zip(own_parts, parts)):
            notes += arrange(own_part, part, orders, f"{path}[{at}]")
    order, saved_groups = orders.get(id(inner(getattr(scheduler, "optimizer", None))), ((), 0))
    if list(order) == list(range(saved_groups)):
        return notes
    for key in _BY_GROUP:
        saved = state.get(key)
        if not isinstance(saved, list) or len(saved) != saved_groups:
            continue
        own = getattr(scheduler, key, ())
        if None in order and len(own) != len(order):
            notes.append(f"{path}: {key} is as it was saved, since groups of its optimizer are new")
            continue
        state[key] = [own[at] if group is None else saved[group] for at, group in enumerate(order)]
    return notes
