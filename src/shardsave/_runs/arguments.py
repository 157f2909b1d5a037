"""Checks of a manager's arguments, before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping

from shardsave._format.file_names import MAX_STEP


def check_step(step: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be a number of finished steps, not {type(step).__name__}")
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be between 0 and {MAX_STEP}, not {step}")


def check_count(**numbers: object) -> None:
    for name, number in numbers.items():
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be a number of steps, not {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")


def checked_best(best: object) -> tuple[str, str, int] | None:
    if best is None:
        return None
    if not isinstance(best, (tuple, list)) or len(best) != 3 or not isinstance(best[0], str):
        raise TypeError(f"keep_best must be like ('loss', 'min', 2), not {best!r}")
    metric, mode, number = best
    if mode not in ("min", "max"):
        raise ValueError(f"keep_best must say 'min' or 'max', not {mode!r}")
    check_count(keep_best=number)
    return metric, mode, number


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
            checked[name] = plain if type(plain) is int else float(plain)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"metrics must map names to numbers, {name!r} is {type(value).__name__}") from error
    return checked
