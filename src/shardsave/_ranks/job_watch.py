"""The watch over one rank of a save: it also ends if another rank fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from shardsave._common.sources import ByteSource
from shardsave._ranks.session import Session
from shardsave._saving.watch import Watch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class JobWatch:
    """The `Watch` of one rank. ``begin_commit``: called where this rank leads, right before the index is renamed."""

    def __init__(self, watch: Watch, session: Session, begin_commit: Callable[[], None]) -> None:
        self.workers = watch.workers
        self.beside_training = watch.beside_training
        self._watch = watch
        self._session = session
        self._begin_commit = begin_commit

    def check(self) -> None:
        self._watch.check()
        self._session.check()

    def attempt_commit(self) -> None:
        self._watch.attempt_commit()
        self._begin_commit()

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        """Shards are written in the order that all ranks know."""
        return False

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        return self._watch.begin_reading(pieces)

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        self._watch.end_reading(pieces, sums)
