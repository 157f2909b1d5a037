"""The global state: all ranks describe what they hold of a state, and each computes the same state of the whole job from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from shardsave._state.module import State


class Session(Protocol):
    """What this needs of a session of several ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def hosts(self) -> Sequence[int]: ...

    def name(self, rank: int) -> str: ...

    def exchange(self, what: str, mine: bytes) -> list[bytes]: ...

    def gather(self, what: str, mine: bytes) -> list[bytes] | None: ...

    def publish(self, what: str, value: bytes | None = None) -> bytes: ...


def agree(session: Session, state: State) -> State:
    """``state`` of this rank as the state of all ranks: equal on all of them, each source a `Spread`.

    Entries have the order that one process would have; the natural order of their names if ranks have different ones. Raises
    UnsupportedTensorError on all ranks if what two ranks say of one tensor is contradictory.
    """
    raise NotImplementedError


def check_replicas(
    session: Session, state: State, on_divergence: Literal["raise", "lowest_rank"]
) -> tuple[State, tuple[str, ...]]:
    """Compares the replicas of ``state``, which `agree` returned. Returns it, and notes for the report.

    If replicas differ: raises UnsupportedTensorError on all ranks, or takes those of the lowest rank, and says so in a note.
    """
    raise NotImplementedError
