"""Follows the tensors whose memory a save reads while training goes on, and lets no step change one before it was read.

Threads: the saving thread calls `check`, `begin_reading` and `end_reading`; threads that train call `before_step`. The lock guards
everything that they share; nobody waits while holding it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from shardsave._background import guard
from shardsave._background.changes import Seen
from shardsave._background.owners import memory_of_optimizer
from shardsave._common.words import count, some
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._common.sources import ByteSource

#: How long a waiting step sleeps before it looks again, in seconds.
_NAP = 0.0005

_STATE = "nothing was committed, a previous checkpoint is intact; staging='snapshot' copies everything in the call"


class Drained:
    """One tensor that is read while training goes on.

    ``owners``: the Parameters or state tensors whose memory it is, as they were at the moment of the call. ``sum``: the checksum of
    its bytes at that moment, if it is known. ``stepped``: an optimizer holds it, so a step may wait for it. ``released``: it was read, or
    need not be, and was compared: it may change.
    """

    __slots__ = ("name", "nbytes", "owners", "piece", "released", "stepped", "sum")

    def __init__(self, name: str, piece: ByteSource, nbytes: int, owners: Sequence[Seen], stepped: bool) -> None:
        self.name = name
        self.piece = piece
        self.nbytes = nbytes
        self.owners = owners
        self.stepped = stepped
        self.sum: int | None = None
        self.released = False

    def change(self) -> str | None:
        """What has happened to the owners since the call, in words; None if nothing is noticed."""
        return next((change for owner in self.owners if (change := owner.change()) is not None), None)


class _Reading:
    """One run of the engine. ``taken``: for each of its pieces, the bytes that have left the memory. ``items``: those not yet read."""

    def __init__(self, items: Mapping[int, Drained], pieces: Sequence[ByteSource]) -> None:
        self.taken: NDArray[np.int64] = np.zeros(len(pieces), np.int64)
        at = [n for n, piece in enumerate(pieces) if id(piece) in items]
        self.items = [items[id(pieces[n])] for n in at]
        self._at = np.array(at, np.int64)
        self._nbytes = np.array([item.nbytes for item in self.items], np.int64)

    def pop_taken(self) -> list[Drained]:
        """The tensors that have been read whole since the last call."""
        is_taken = self.taken[self._at] >= self._nbytes
        if not is_taken.any():
            return []
        taken = [self.items[n] for n in np.flatnonzero(is_taken)]
        left = np.flatnonzero(~is_taken)
        self.items = [self.items[n] for n in left]
        self._at, self._nbytes = self._at[left], self._nbytes[left]
        return taken


class Drain:
    """A `guard.Guard` for ``items``. ``ended`` is called once, when nothing is left to be read or when the save has failed.

    ``timeout``: how many seconds a step waits before it goes on and the save fails.
    """

    def __init__(self, items: Sequence[Drained], timeout: float, ended: Callable[[], None]) -> None:
        self.step_wait_seconds = 0.0
        self._items = {id(item.piece): item for item in items}
        self._left = len(self._items)
        self._of_owner: dict[int, list[Drained]] = {}
        self._at_storage: dict[int, list[Drained]] = {}
        for item in items:
            for owner in item.owners:
                self._of_owner.setdefault(id(owner.tensor), []).append(item)
                self._at_storage.setdefault(owner.tensor.untyped_storage().data_ptr(), []).append(item)
        self._without_step = [item for item in items if not item.stepped]
        self._timeout = timeout
        self._ended = ended
        self._lock = threading.Lock()
        self._readings: list[_Reading] = []
        self._failure: str | None = None
        self._over = False

    def check(self) -> None:
        """Compares what has been read since the last call. Raises SaveNotCommittedError if the save has failed."""
        with self._lock:
            self._release_taken()
        self.raise_failure()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise SaveNotCommittedError(self._failure)

    @property
    def complete(self) -> bool:
        """Whether all was read, compared and found unchanged."""
        return self._left == 0 and self._failure is None

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        """As `Watch.is_urgent`."""
        return any((item := self._items.get(id(piece))) is not None and item.stepped for piece in pieces)

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        """As `Watch.begin_reading`. Raises SaveNotCommittedError if a tensor has already changed: its memory may be gone."""
        reading = _Reading(self._items, pieces)
        with self._lock:
            self._fail_if_changed(reading.items)
            self._readings.append(reading)
        self.raise_failure()
        return reading.taken

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        """As `Watch.end_reading`. Raises SaveNotCommittedError."""
        for piece, found in zip(pieces, sums):
            item = self._items.get(id(piece))
            if item is not None and item.sum not in (None, found):
                raise SaveNotCommittedError(_changed(item.name, "its checksum is another one"))
        with self._lock:
            for piece in pieces:
                if (item := self._items.get(id(piece))) is not None:
                    self._release(item)
        self.raise_failure()

    def fail(self, message: str) -> None:
        """Ends the drain; `check` will raise an error with ``message``, unless the save had already failed or read everything."""
        with self._lock:
            self._fail(message)

    def finish(self) -> None:
        """Ends the drain, whatever it has reached, and lets all steps go."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """Drops all references to tensors, after `finish`."""
        with self._lock:
            self._items, self._of_owner, self._at_storage, self._readings, self._without_step = {}, {}, {}, [], []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Waits until what ``optimizer`` holds has been read, and compares it. Raises nothing into the training."""
        try:
            self._wait_for(optimizer)
        except Exception as error:  # of an optimizer whose groups or state are of a kind of their own
            self.fail(
                f"cannot save while training goes on: the tensors of {type(optimizer).__name__} were expected, its state raised "
                f"{type(error).__name__}: {' '.join(str(error).split())}; {_STATE}"
            )

    def _wait_for(self, optimizer: torch.optim.Optimizer) -> None:
        if self._over or not (waiting := list(dict.fromkeys(self._held_by(optimizer)))):
            return
        started = time.perf_counter()
        try:
            with self._lock:
                self._fail_if_changed(waiting)  # nobody need wait for what is lost
            while True:
                with self._lock:
                    self._release_taken()
                waiting = [item for item in waiting if not item.released]
                if not waiting or self._over:
                    return
                if time.perf_counter() - started >= self._timeout:
                    names = some([repr(item.name) for item in waiting])
                    self.fail(
                        f"cannot save while training goes on: {count(len(waiting), 'tensor')} ({names}) had to be read before a step "
                        f"of {type(optimizer).__name__}, which has waited for {self._timeout:g} seconds and goes on; {_STATE}"
                    )
                    return
                time.sleep(_NAP)
        finally:
            with self._lock:
                self.step_wait_seconds += time.perf_counter() - started

    def _held_by(self, optimizer: torch.optim.Optimizer) -> Iterator[Drained]:
        """What must be read before a step of ``optimizer``, which holds the same objects or others with the same memory; some twice.

        What no optimizer holds counts for each of them: after the step, a frozen teacher may follow what was trained, unseen by torch.
        """
        for tensor in memory_of_optimizer(optimizer):
            of_owner = self._of_owner.get(id(tensor), ())
            for item in (*of_owner, *self._at_storage.get(tensor.untyped_storage().data_ptr(), ())):
                if not item.released:
                    yield item
        yield from (item for item in self._without_step if not item.released)

    def _fail_if_changed(self, items: Sequence[Drained]) -> None:
        for item in items:
            if not item.released and (change := item.change()) is not None:
                self._fail(_changed(item.name, change))

    def _release_taken(self) -> None:
        for reading in self._readings:
            for item in reading.pop_taken():
                self._release(item)

    def _release(self, item: Drained) -> None:
        if item.released or self._over:
            return
        if (change := item.change()) is not None:
            self._fail(_changed(item.name, change))
            return
        item.released = True
        self._left -= 1
        if not self._left:
            self._end()

    def _fail(self, message: str) -> None:
        if not self._over:
            self._failure = message
            self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            guard.disarm(self)
            self._ended()


def _changed(name: str, change: str) -> str:
    return f"cannot save {name!r} while training goes on: its bytes of the moment of the call were expected, {change}; {_STATE}"
