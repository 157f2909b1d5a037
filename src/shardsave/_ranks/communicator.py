"""What the steps of a collective verb need of the session of its ranks: how they tell each other values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Communicator(Protocol):
    """The ranks of one call; `session` has the implementation."""

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
