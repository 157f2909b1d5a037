"""Learning-rate schedulers: whether one of torch's can go on from a state, which it takes whatever it is. And its lists, with a value for
each group of its optimizer: puts these into the order of other groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from shardsave._common.words import some
from shardsave._training.kinds import inner
from shardsave._training.value_kinds import fits, kind_in_words, value_in_words

#: The members of a scheduler's state that are lists with one value for each group.
_BY_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")

#: The members that torch's schedulers have had in all versions, if they have them at all: no scheduler can go on without them.
_NEEDED = ("last_epoch", "base_lrs", "lr_lambdas", "_schedulers")

#: Members that hold the attributes of a user's function, or None: of what is in them, nothing is known.
_OF_USERS = ("lr_lambdas", "_scale_fn_custom")

#: Members that are None with other arguments of the scheduler.
_MAY_BE_NONE = ("default_min_lr",)

#: For each group of an optimizer, the saved group that it continues (None: there is none), and how many groups were saved.
Order = tuple[Sequence["int | None"], int]


def wrong_state(scheduler: Any, state: Any, orders: Mapping[int, Order], path: str) -> str | None:
    """What in ``state`` the ``scheduler`` could not go on from, in words; None if there is nothing, or nothing is known of its class.

    ``orders``: id of an optimizer → the order of its groups.
    """
    scheduler = inner(scheduler)
    kind = type(scheduler)
    if not isinstance(scheduler, LRScheduler) or not kind.load_state_dict.__module__.startswith("torch.optim."):
        return None
    if not isinstance(state, dict):
        return f"{path}: a dict was expected, the checkpoint has {value_in_words(state)}"
    own = scheduler.state_dict()
    if lacking := [repr(key) for key in _NEEDED if key in own and key not in state]:
        return f"{path}: {some(lacking)} was expected, the checkpoint has none"
    for key in state:
        if type(key) is not str or key == "optimizer" or callable(getattr(kind, key, None)):
            return f"{path}: the state of a scheduler was expected, the checkpoint has a value for {key!r:.80}"
    _, saved_groups = orders.get(id(inner(getattr(scheduler, "optimizer", None))), ((), None))
    is_of_torch = kind.__module__.startswith("torch.optim.")
    for key in (key for key in own if key in state):
        value, example = state[key], own[key]
        if key == "_schedulers":
            if wrong := _wrong_parts(scheduler, value, orders, path):
                return wrong
        elif key in _BY_GROUP and not _has_length(value, example, saved_groups):
            return f"{path}[{key!r}]: a list of {len(example)} was expected, the checkpoint has {value_in_words(value)}"
        if key in _OF_USERS or key == "_schedulers" or not (is_of_torch or key in (*_NEEDED, *_BY_GROUP, "_step_count")):
            continue
        if not _follows(value, example) and not (value is None and key in _MAY_BE_NONE):
            return f"{path}[{key!r}]: a value like {value_in_words(example)} was expected, the checkpoint has {value_in_words(value)}"
    return None


def _has_length(value: Any, example: Any, saved_groups: int | None) -> bool:
    """Whether ``value`` has an item for each group, as ``example`` has, or for each that was saved."""
    if not isinstance(example, (list, tuple)):
        return True
    return isinstance(value, (list, tuple)) and len(value) in (len(example), saved_groups)


def _wrong_parts(scheduler: Any, states: Any, orders: Mapping[int, Order], path: str) -> str | None:
    """The same for the schedulers of which ``scheduler`` consists."""
    parts = scheduler._schedulers
    if not isinstance(states, list) or len(states) != len(parts):
        return f"{path}: a list of {len(parts)} schedulers was expected, the checkpoint has {value_in_words(states)}"
    found = (wrong_state(part, state, orders, f"{path}[{at}]") for at, (part, state) in enumerate(zip(parts, states)))
    return next((wrong for wrong in found if wrong), None)


def _follows(value: Any, example: Any) -> bool:
    """Whether ``value`` can be where ``example`` is: a list may have another length, a dict other keys than names."""
    if example is None or kind_in_words(example) is None:
        return True
    if isinstance(example, (list, tuple)):
        return isinstance(value, (list, tuple)) and (not example or all(_follows(item, example[0]) for item in value))
    if isinstance(example, Mapping):
        names = [key for key in example if type(key) is str]
        return isinstance(value, Mapping) and all(key in value and _follows(value[key], example[key]) for key in names)
    return fits(value, example)


def arrange(scheduler: Any, state: Any, orders: Mapping[int, Order], path: str) -> list[str]:
    """Changes ``state``, which the scheduler will load, for the groups that its optimizer has now. Returns notes."""
    scheduler = inner(scheduler)
    if not isinstance(state, dict):
        return []
    for key, value in state.items():
        if type(value) is dict and type(getattr(scheduler, str(key), None)) is Counter:  # it was saved as a dict
            state[key] = Counter(value)
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
