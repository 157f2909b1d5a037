"""The error of a job: it begins on one rank, travels as text, and is raised on all."""

from __future__ import annotations

import json
from typing import NamedTuple

from shardsave import errors
from shardsave._printable import printable
from shardsave.errors import ShardSaveError

_LONGEST = 32_000


#: Errors of Python that say what is wrong with an argument, or that memory is lacking: all ranks raise them.
_BUILTIN: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError, "MemoryError": MemoryError}


class StoreLost(ShardSaveError):
    """The store of torch.distributed is gone: what the other ranks do cannot be known any more."""


class JobFailed(ShardSaveError):
    """A rank was lost, interrupted, or failed in a way that has no class of its own."""


class Failure(NamedTuple):
    """``kind``: the name of the error's class, or empty for that of the call. ``lost``: the ranks in the group that are gone."""

    kind: str
    text: str
    lost: tuple[int, ...] = ()

    def packed(self) -> bytes:
        return json.dumps([self.kind, self.text[:_LONGEST], self.lost]).encode()

    def error(self, usual: type[ShardSaveError]) -> Exception:
        """What is raised. ``usual``: the class of an error that has no class of its own."""
        kind = _BUILTIN.get(self.kind) or (getattr(errors, self.kind) if self.kind in errors.__all__ else usual)
        error: Exception = kind(printable(self.text))  # errors of Python do not escape what they say
        return error


def unpacked(packed: bytes) -> Failure:
    kind, text, lost = json.loads(packed)
    return Failure(kind, text, tuple(lost))


def is_foreign(error: BaseException) -> bool:
    """Whether ``error`` is of a class that this package does not raise: it comes from code of the user or of a library.

    Other ranks may not have its class. The rank that it struck raises it as it is.
    """
    return not isinstance(error, ShardSaveError) and type(error) not in _BUILTIN.values()


def failure_of(error: BaseException, who: str) -> Failure:
    """``error``, which struck on the rank that is called ``who``; empty if it concerns all ranks alike."""
    if not isinstance(error, Exception):
        return Failure("", f"{who} was interrupted")
    begin = f"{who}: " if who else ""
    if is_foreign(error):
        return Failure("", f"{begin}{type(error).__name__}: {error}")
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind is not ShardSaveError]
    return Failure(next((kind for kind in kinds if kind in _BUILTIN or kind in errors.__all__), ""), f"{begin}{error}")
