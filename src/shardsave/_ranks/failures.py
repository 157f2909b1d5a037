"""The error of a job: it begins on one rank, travels as text, and is raised on all."""

from __future__ import annotations

import json
from typing import NamedTuple

from shardsave import errors
from shardsave.errors import ShardSaveError

_LONGEST = 32_000


class StoreLost(ShardSaveError):
    """The store of torch.distributed is gone: what the other ranks do cannot be known any more."""


class Failure(NamedTuple):
    """``kind``: the name of the error's class, or empty for that of the call. ``lost``: the ranks in the group that are gone."""

    kind: str
    text: str
    lost: tuple[int, ...] = ()

    def packed(self) -> bytes:
        return json.dumps([self.kind, self.text[:_LONGEST], self.lost]).encode()

    def error(self, usual: type[ShardSaveError]) -> Exception:
        """What is raised. ``usual``: the class of an error that has no class of its own."""
        builtin: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError, "MemoryError": MemoryError}
        kind = builtin.get(self.kind) or (getattr(errors, self.kind) if self.kind in errors.__all__ else usual)
        error: Exception = kind(self.text)
        return error


def unpacked(packed: bytes) -> Failure:
    kind, text, lost = json.loads(packed)
    return Failure(kind, text, tuple(lost))


def failure_of(error: BaseException, who: str) -> Failure:
    """``error``, which struck on the rank that is called ``who``."""
    if not isinstance(error, Exception):
        return Failure("", f"{who} was interrupted")
    for kind in type(error).__mro__:
        if kind in (TypeError, ValueError, MemoryError) or (kind.__name__ in errors.__all__ and kind is not ShardSaveError):
            return Failure(kind.__name__, f"{who}: {error}")
    text = str(error) if isinstance(error, ShardSaveError) else f"{type(error).__name__}: {error}"
    return Failure("", f"{who}: {text}")
