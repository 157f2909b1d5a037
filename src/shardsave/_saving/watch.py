"""Watches a save from outside: what it is told while it works, and how it can be ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from shardsave._common.shutdown import raise_if_ending
from shardsave._common.sources import ByteSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Watch(Protocol):
    """What `write_checkpoint` calls on the thread that saves. Each may raise: then nothing is committed."""

    @property
    def workers(self) -> int | None:
        """The most threads that the engine may use; None leaves it the choice."""

    @property
    def beside_training(self) -> bool:
        """Whether steps of a training may change tensors, but for frozen ones, while the save decides what it has to write."""

    def check(self) -> None:
        """Called again and again, also while the save waits for the directory's lock."""

    def attempt_commit(self) -> None:
        """Called right before the index is renamed. If it returns, the save can no longer be ended."""

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        """Whether somebody waits until the memory of ``pieces`` has been read: such shards are written first."""

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        """Called before the memory of ``pieces`` is read. The engine counts in the result, one number for each piece, the bytes that it
        has taken from there; None: nobody wants to know.
        """

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        """Called after the memory of ``pieces`` was read, with the checksum of each."""

    def leave_out(self, pieces: Sequence[ByteSource]) -> None:
        """Called for pieces whose memory will not be read any more, since what they hold is on disk already."""


class Unwatched:
    """A save that nobody watches."""

    workers: int | None = None
    beside_training = False

    def check(self) -> None:
        raise_if_ending()

    def attempt_commit(self) -> None:
        pass

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        return False

    def begin_reading(self, pieces: Sequence[ByteSource]) -> None:
        pass

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        pass

    def leave_out(self, pieces: Sequence[ByteSource]) -> None:
        pass


UNWATCHED = Unwatched()
