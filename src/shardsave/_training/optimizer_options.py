"""Which options a group of an optimizer can take: each must be of a kind that this option has, or it would fail only in a later step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardsave._training.kinds import inner
from shardsave._training.value_kinds import FLAG, fits, kind_in_words, value_in_words

#: Options that torch's schedulers add to a group. All are numbers.
_OF_SCHEDULERS = dict.fromkeys(("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"), 0.0)


def known_options(optimizer: Any) -> tuple[Mapping[str, Any], ...]:
    """What is known of the options of ``optimizer``: its defaults, those of its class, and what schedulers add. Each: name → a value."""
    optimizer = inner(optimizer)
    return getattr(optimizer, "defaults", {}), dict(_defaults_of_class(type(optimizer))), _OF_SCHEDULERS


def wrong_option(saved: Mapping[str, Any], live: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> str | None:
    """The first of the ``saved`` options that a group cannot take, in words; None if it can take all. ``known``: see `known_options`.

    An option may be what it is in the ``live`` group, or by default. So an int may follow a float or a tensor, and None may come where
    the class knows it. Of options that are not those of the optimizer, nothing is known, and all is taken.
    """
    for name, value in saved.items():
        examples = [values[name] for values in known if name in values]
        if not examples:
            continue
        examples += [live[name]] if name in live else []
        kinds = dict.fromkeys(map(kind_in_words, examples))
        # Nothing tells what else an option can be that is None everywhere.
        if kinds.keys() <= {"None"} or None in kinds or any(fits(value, example) for example in examples):
            continue
        return (
            f"the option {name!r} was expected to be {' or '.join(map(str, kinds))}, the checkpoint has {value_in_words(value)}"
        )
    return None


def _defaults_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            yield name, parameter.default


def options_not_saved(optimizer: Any, saved: Mapping[str, Any]) -> list[str]:
    """The options of ``optimizer`` that are not in ``saved``, those of a group. Flags do not count: versions of torch add some."""
    defaults = getattr(inner(optimizer), "defaults", {})
    return [
        name
        for name, value in defaults.items()
        if name not in saved and kind_in_words(value) not in (None, "None", FLAG, "text")
    ]


def is_of_torch(optimizer: Any) -> bool:
    """Whether the class of ``optimizer`` is torch's, so that it always saves its options."""
    return type(inner(optimizer)).__module__.startswith("torch.optim")
