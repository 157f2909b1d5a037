"""Checks of a manager's arguments, before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

from shardsave._format.file_names import MAX_STEP


def checked_step(step: object) -> int:
    """``step`` as an int; whole numbers of numpy are as good."""
    if isinstance(step, bool) or not isinstance(step, Integral):
        raise TypeError(f"step must be a whole number of finished steps, not {type(step).__name__}")
    number = int(step)
    if not 0 <= number <= MAX_STEP:
        raise ValueError(f"step must be between 0 and {MAX_STEP}, not {number}")
    return number


def checked_count(name: str, number: object) -> int | None:
    """``number``, of the argument ``name``, as an int; None stays None."""
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name} must be a whole number of steps, not {number!r}")
    if int(number) < 1:
        raise ValueError(f"{name} must be at least 1, not {number}")
    return int(number)


def checked_best(best: object) -> tuple[str, str, int] | None:
    if best is None:
        return None
    if not isinstance(best, (tuple, list)) or len(best) != 3 or not isinstance(best[0], str):
        raise TypeError(f"keep_best must be like ('loss', 'min', 2), not {best!r}")
    metric, mode, number = best
    if mode not in ("min", "max"):
        raise ValueError(f"keep_best must say 'min' or 'max', not {mode!r}")
    counted = checked_count("keep_best", number)
    if counted is None:
        raise TypeError(f"keep_best must be like ('loss', 'min', 2), not {best!r}")
    return metric, mode, counted


def checked_metrics(metrics: object) -> dict[str, float]:
    """The metrics as plain numbers; a tensor of one element is one."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics must map names to numbers, not {type(metrics).__name__}")
    checked: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"metrics must map names to numbers, {name!r} is no name")
        try:
            plain = value.item() if hasattr(value, "item") else value  # float() of a tensor that requires grad would warn
            if isinstance(plain, (bool, str, bytes)):  # as `save` does, though float() takes them
                raise TypeError(f"{plain!r} is no number")
            checked[name] = plain if type(plain) is int else float(plain)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"metrics must map names to numbers, {name!r} is {type(value).__name__}") from error
    return checked
