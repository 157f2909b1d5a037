"""What the two kinds of links of an exchange have in common: whom they call, and what they say of ranks that have left."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Lost(NamedTuple):
    """A rank whose connection has ended too early, and whether it said that it would leave."""

    rank: int
    said: bool


class Callbacks(Protocol):
    """What links call on their threads; `Exchange` has it."""

    def done(self, rank: int, number: int) -> None:
        """Another rank is done with a block of this one."""

    def work_in(self, owner: int, number: int, address: int) -> None:
        """The window of a block of ``owner`` is open for this rank."""

    def count(self, nbytes: int) -> None:
        """This rank has given or taken ``nbytes`` of another one's block."""

    def fail(self, error: BaseException) -> None:
        """Something failed."""

    def wake(self) -> None:
        """What links say about themselves has changed."""
