"""Names of DCP, and where what they name is stored: tensors of the model as weights by its own names, all else as a training state.

DCP names a value of a nested state dict by the keys that lead to it, joined by dots. Its planner knows the keys; they are kept too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, NoReturn, Union

from shardsave._common.words import count, some
from shardsave.errors import UnsupportedTensorError
from shardsave.integrations._dcp_model import ModelRecord

#: The keys that lead to a value of a nested state dict: names, and positions in lists.
Path = tuple[Union[str, int], ...]


class Rule(NamedTuple):
    """How DCP calls the weights: the path of the weight ``name`` is ``(*under, prefix + name)``."""

    under: Path = ()
    prefix: str = ""

    def path(self, name: str) -> Path:
        return (*self.under, self.prefix + name)

    @property
    def start(self) -> str:
        """What the joined name of each weight begins with."""
        return name_of((*self.under, self.prefix))


def name_of(path: Path) -> str:
    """DCP's name of the value at ``path``."""
    return ".".join(map(str, path))


def path_of(name: str, mappings: Any) -> Path:
    """The path of the value that DCP calls ``name``. ``mappings``: what the planner says of names."""
    path = mappings.get(name) if isinstance(mappings, Mapping) else None
    if isinstance(path, tuple) and path and all(type(key) in (str, int) for key in path) and name_of(path) == name:
        return path
    return (name,)


def find_rule(record: ModelRecord, paths: Mapping[str, Path]) -> Rule | None:
    """The rule by which ``paths`` (DCP's name of a tensor → its path) call the tensors of a model; None if none of them is one.

    Raises UnsupportedTensorError if there are two sets of tensors with the names of the model.
    """
    starts: Counter[str] = Counter()
    for name in paths:
        at = 0
        while at >= 0:
            if name[at:] in record.names:
                starts[name[:at]] += 1
            at = name.find(".", at) + 1 or -1
    most = max(starts.values(), default=0)
    best = [start for start, number in starts.items() if number == most]
    if not best:
        return None
    longest = max(best, key=len)
    other = next((start for start in best if not longest.startswith(start)), None)
    if other is not None:
        raise UnsupportedTensorError(
            f"cannot save the state dict: one set of tensors of the model ({record.kind}) was expected, there are some below {longest!r} "
            f"and below {other!r}; say with prefix= which of them are its weights; nothing was written"
        )
    return rule_for(longest, paths)


def rule_for(start: str, paths: Mapping[str, Path]) -> Rule | None:
    """The rule of the weights whose names begin with ``start``; None if there are none."""
    path = next((path for name, path in paths.items() if name.startswith(start)), None)
    if path is None:
        return None
    for length in range(len(path) - 1, 0, -1):
        joined = f"{name_of(path[:length])}."
        if start.startswith(joined):
            return Rule(path[:length], start[len(joined) :])
    return Rule((), start)


def weight_name(name: str, rule: Rule | None, record: ModelRecord | None) -> str | None:
    """The name under which the tensor that DCP calls ``name`` is stored among the weights; None if it is no weight."""
    if rule is None or not name.startswith(rule.start):
        return None
    rest = name[len(rule.start) :]
    if record is None:
        return rest
    return record.names.get(rest, rest if rule.start and rest else None)


def refuse_no_weights(prefix: str | None, record: ModelRecord | None, names: Collection[str]) -> NoReturn:
    """Raises UnsupportedTensorError, since none of the tensors ``names`` is one of the model."""
    expected = (
        f"with names that begin with {prefix!r}" if prefix is not None or record is None else f"of the model ({record.kind})"
    )
    found = f"it has {count(len(names), 'value')}: {some(names)}" if names else "it is empty"
    raise UnsupportedTensorError(
        f"cannot save the state dict: tensors {expected} were expected in it, {found}; nothing was written"
    )
