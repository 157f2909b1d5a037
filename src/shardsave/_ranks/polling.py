"""How often a rank looks into the store: the more look, the more seldom each."""

from __future__ import annotations

import time

#: Seconds between two looks for each one that looks, at first and later: a store answers some 30,000 calls a second.
_FIRST_SHARE = 20e-6
_LATER_SHARE = 400e-6
_SHORTEST = 0.0005
_LATER = 0.05
_LONGEST = 1.0
_GROWTH = 1.5


class PollIntervals:
    """Pauses of ``first`` seconds that grow from look to look, up to ``last``."""

    def __init__(self, first: float, last: float) -> None:
        self._first = first
        self._last = last
        self.restart()

    def restart(self) -> None:
        """Something is expected soon."""
        self._pause = self._first
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time for a look; then the next pause begins."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._pause
        self._pause = min(self._last, self._pause * _GROWTH)
        return True

    def rest(self) -> float:
        """Seconds until the next look."""
        return max(0.0, self._next - time.monotonic())


def pauses_for(lookers: int) -> PollIntervals:
    """The pauses of one of ``lookers`` that look into the same store."""
    first = max(_SHORTEST, lookers * _FIRST_SHARE)
    return PollIntervals(first, max(first, min(_LONGEST, max(_LATER, lookers * _LATER_SHARE))))
