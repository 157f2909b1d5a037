"""Which of a checkpoint's tensors are meant by names and a prefix, and what is said where there are none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from shardsave._storage.checkpoint import Checkpoint
from shardsave.errors import IncompatibleCheckpointError


def check_names(names: Iterable[str] | None, prefix: str) -> frozenset[str] | None:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, not {type(prefix).__name__}")
    if names is None:
        return None
    if isinstance(names, (str, bytes)):
        raise TypeError("names must be an iterable of names, not one string")
    wanted = frozenset(names)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, not {type(name).__name__}")
        if not name.startswith(prefix):
            raise ValueError(f"names are given as they stand in the checkpoint: {name!r} does not begin with prefix {prefix!r}")
    return wanted


class _Asked:
    """Whether a name of the checkpoint is asked for."""

    def __init__(self, names: frozenset[str] | None, prefix: str) -> None:
        self._names = names
        self._prefix = prefix

    def __call__(self, name: str) -> bool:
        return name.startswith(self._prefix) and (self._names is None or name in self._names)


def selection(names: frozenset[str] | None, prefix: str) -> _Asked | None:
    """None where everything is asked for, so that a great many names need not be looked at one by one."""
    asked = _Asked(names, prefix)
    return asked if prefix or names is not None else None


def choose(checkpoint: Checkpoint, names: frozenset[str] | None, prefix: str) -> dict[str, str]:
    """What is asked for: name → the name under which its bytes are stored, in the checkpoint's order."""
    known = {name: name for name in checkpoint.stored_names} | dict(checkpoint.ties)
    missing = sorted(names - known.keys()) if names is not None else []
    if missing:
        close = difflib.get_close_matches(missing[0], known, n=1)
        hint = f" (the closest is {close[0]!r})" if close else ""
        raise IncompatibleCheckpointError(
            f"cannot load from {checkpoint.path}: {missing[0]!r} was asked for{hint}, the checkpoint has no tensor of that name"
            + (f", nor {len(missing) - 1} other{'s' if len(missing) > 2 else ''} asked for" if len(missing) > 1 else "")
        )
    asked = selection(names, prefix)
    chosen = known if asked is None else {name: stored for name, stored in known.items() if asked(name)}
    if prefix and names is None and not chosen and known:
        raise IncompatibleCheckpointError(
            f"cannot load from {checkpoint.path}: names that begin with {prefix!r} were asked for, {_names_like(prefix, known)}"
        )
    return chosen


def _names_like(prefix: str, known: Iterable[str]) -> str:
    """What names there are on the level on which ``prefix`` goes astray, and which of them may have been meant."""
    parts = prefix.removesuffix(".").split(".")
    start, depth = "", 0
    while depth < len(parts) - 1 and any(name.startswith(f"{start}{parts[depth]}.") for name in known):
        start, depth = f"{start}{parts[depth]}.", depth + 1
    below = sorted({name[len(start) :].split(".")[0] for name in known if name.startswith(start)})
    close = difflib.get_close_matches(parts[depth], below, n=1)
    hint = f" (the closest is {start + close[0] + '.'!r})" if close else ""
    those = f"the checkpoint's that begin with {start!r} go on with" if start else "the checkpoint's begin with"
    return f"{those} {', '.join(below[:5])}{', …' if len(below) > 5 else ''}{hint}"
