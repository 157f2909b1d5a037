"""Selects tensors of a checkpoint by ``names`` and ``prefix``; suggests close matches when nothing matches."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from torch import nn

from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave.errors import IncompatibleCheckpointError


def check_names(names: Iterable[str] | None, prefix: str) -> frozenset[str] | None:
    """``names`` as a set, None for all. Raises TypeError, and ValueError if one does not begin with ``prefix``."""
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
            raise ValueError(f"names must be written as in the checkpoint: {name!r} does not begin with prefix {prefix!r}")
    return wanted


class _Filter:
    """Whether a name of the checkpoint is selected."""

    def __init__(self, names: frozenset[str] | None, prefix: str) -> None:
        self._names = names
        self._prefix = prefix

    def __call__(self, name: str) -> bool:
        return name.startswith(self._prefix) and (self._names is None or name in self._names)


def selection(names: frozenset[str] | None, prefix: str) -> _Filter | None:
    """A filter for names; None if all are selected, so that a checkpoint with very many names is not searched one by one."""
    return _Filter(names, prefix) if prefix or names is not None else None


def stored_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Every name, tied names too → the name under which its bytes are stored, in the order of the index."""
    names = list(checkpoint.stored_names)
    return {**dict(zip(names, names)), **checkpoint.ties}


def choose(checkpoint: Checkpoint, names: frozenset[str] | None, prefix: str) -> dict[str, str]:
    """Selected name → the name under which its bytes are stored. Raises IncompatibleCheckpointError if a name is
    not there, or none begins with ``prefix``.
    """
    known = stored_names(checkpoint)
    missing = sorted(names - known.keys()) if names is not None else []
    if missing:
        raise IncompatibleCheckpointError(
            f"cannot load from {checkpoint.path}: {missing[0]!r} was asked for{closest(missing[0], known)}, the checkpoint has no "
            f"tensor of that name"
            + (f", nor {len(missing) - 1} other{'s' if len(missing) > 2 else ''} asked for" if len(missing) > 1 else "")
        )
    wanted = selection(names, prefix)
    chosen = known if wanted is None else {name: stored for name, stored in known.items() if wanted(name)}
    if prefix and names is None and not chosen and known:
        raise IncompatibleCheckpointError(
            f"cannot load from {checkpoint.path}: names that begin with {prefix!r} were asked for, {_names_like(prefix, known)}"
        )
    return chosen


def choose_located(checkpoint: Checkpoint, prefix: str) -> dict[str, Located]:
    """Every name that begins with ``prefix``, without it → the stored tensor. Raises IncompatibleCheckpointError if there is none."""
    tensors = checkpoint.tensors
    if not prefix:
        names = list(checkpoint.stored_names)
        in_order = names == list(tensors)  # looking up very many names takes far longer than comparing them in turn
        located = dict(tensors) if in_order else {name: tensors[name] for name in names}
        located.update((name, tensors[stored]) for name, stored in checkpoint.ties.items())
        return located
    return {name.removeprefix(prefix): tensors[stored] for name, stored in choose(checkpoint, None, prefix).items()}


def names_of_wrappers(module: nn.Module, expected: frozenset[str], stored: Collection[str]) -> dict[str, str]:
    """Name in ``stored`` → the name without wrappers around ``module`` or inside it, as ``expected`` has it.

    A state dict of a wrapped module has the names of its wrappers. Empty if ``stored`` fits better as it is.
    """
    if expected.issuperset(stored):
        return {}
    names = Names.of(module)
    plain = {name: names.plain(name) for name in stored}
    renamed = {name: own if own in expected else name for name, own in plain.items()}
    fits_better = sum(name in expected for name in renamed.values()) > sum(name in expected for name in stored)
    return renamed if fits_better and len(set(renamed.values())) == len(renamed) else {}


def closest(name: str, known: Iterable[str], start: str = "", end: str = "") -> str:
    """A hint for an error message: the name in ``known`` most like ``name``, between ``start`` and ``end``; empty if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (the closest is {start + close[0] + end!r})" if close else ""


def _names_like(prefix: str, known: Iterable[str]) -> str:
    """Which names exist at the level where ``prefix`` stops matching, and the one that was probably meant."""
    parts = prefix.removesuffix(".").split(".")
    start, depth = "", 0
    while depth < len(parts) - 1 and any(name.startswith(f"{start}{parts[depth]}.") for name in known):
        start, depth = f"{start}{parts[depth]}.", depth + 1
    below = sorted({name[len(start) :].split(".")[0] for name in known if name.startswith(start)})
    group = f"the checkpoint's names that begin with {start!r} continue with" if start else "the checkpoint's names begin with"
    more = ", …" if len(below) > 5 else ""
    return f"{group} {', '.join(below[:5])}{more}{closest(parts[depth], below, start, '.')}"
