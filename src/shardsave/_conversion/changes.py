"""The changes that a conversion makes to names: some are left out, some replaced. Checks these arguments, too."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Union

from shardsave._foreign.pickled_tensors import Allowed
from shardsave._printable import printable

Drop = Union[str, Iterable[str]]
Rename = Iterable[tuple[str, str]]


class Names:
    """Decides which names of the source are converted, and their new names; remembers renamed names for the report."""

    def __init__(self, drop: tuple[str, ...], rename: tuple[tuple[re.Pattern[str], str], ...]) -> None:
        self.renamed: dict[str, str] = {}
        self._used: set[tuple[str, str]] = set()  # "drop" or "rename", and the pattern that matched
        self._drop = drop
        self._rename = rename

    def wanted(self, name: str, *, exact: bool = True) -> bool:
        """Whether ``name`` is not in ``drop`` and matches no pattern there. Without ``exact``, that it is in ``drop`` does not count."""
        matching = [pattern for pattern in self._drop if (exact if name == pattern else fnmatch.fnmatchcase(name, pattern))]
        self._used.update(("drop", pattern) for pattern in matching)
        return not matching

    def drops_exactly(self, name: str) -> bool:
        """Whether one of the patterns is ``name`` itself."""
        return name in self._drop

    def new(self, name: str) -> str:
        """``name`` after all replacements, in order."""
        new_name = name
        for pattern, replacement in self._rename:
            new_name, matches = pattern.subn(replacement, new_name)
            if matches:
                self._used.add(("rename", pattern.pattern))
        if new_name != name:
            self.renamed[name] = new_name
        return new_name

    def notes(self) -> tuple[str, ...]:
        """A note for each pattern that matched no name, which is most likely a typing mistake."""
        all_patterns = [
            *(("drop", pattern) for pattern in self._drop),
            *(("rename", pattern.pattern) for pattern, _ in self._rename),
        ]
        return tuple(
            f"{argument}={pattern!r} matched no name"
            for argument, pattern in all_patterns
            if (argument, pattern) not in self._used
        )


def patterns(drop: object) -> tuple[str, ...]:
    """Checks the argument ``drop``; returns its shell patterns."""
    listed = (drop,) if isinstance(drop, str) else tuple(drop) if isinstance(drop, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError("drop must be shell patterns, strings such as 'optimizer.*'")
    return listed


def allowed_names(allow: object) -> Allowed:
    """Checks the argument ``allow``; returns the names in it."""
    listed = (allow,) if isinstance(allow, str) else tuple(allow) if isinstance(allow, Iterable) else None
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise TypeError("allow must be names of classes, strings such as 'my_code.Config'")
    return Allowed(listed)


def replacements(rename: object) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Checks the argument ``rename``; returns its compiled expressions and their replacements."""
    pairs = tuple(rename) if isinstance(rename, Iterable) and not isinstance(rename, (str, Mapping)) else None
    if pairs is None or not all(
        isinstance(p, (tuple, list)) and len(p) == 2 and all(isinstance(s, str) for s in p) for p in pairs
    ):
        raise TypeError("rename must be pairs of a regular expression and a replacement, such as [('^module[.]', '')]")
    compiled_pairs = []
    for pattern, replacement in pairs:
        try:
            compiled = re.compile(pattern)
            re.sub(f"{pattern}|", replacement, "")
        except (re.error, IndexError) as error:
            raise ValueError(
                f"rename must have valid regular expressions and replacements, not {pattern!r} and {replacement!r}: {printable(str(error))}"
            ) from error
        compiled_pairs.append((compiled, replacement))
    return tuple(compiled_pairs)
