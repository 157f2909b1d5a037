"""Who is still alive, judged by signs of life."""

from __future__ import annotations

import time
from collections.abc import Iterable

#: How many signs of life are given within the time after which a rank that gives none is lost.
_BEATS = 8
#: Seconds between them, at most.
_LONGEST = 10.0


class Pulse:
    """When to give a sign of life, and who has not given one for ``timeout`` seconds.

    Time is counted while this process runs: one that was stopped for an hour must not take the others for dead when it wakes up.
    """

    def __init__(self, timeout: float, watched: Iterable[int] = ()) -> None:
        self.timeout = timeout
        self.period = min(timeout / _BEATS, _LONGEST)
        self._ticks = 0.0
        self._last = time.monotonic()
        self._next = 0.0
        self._heard = dict.fromkeys(watched, 0.0)

    def due(self) -> bool:
        """Whether it is time for the next sign of life."""
        if self._now() < self._next:
            return False
        self._next = self._now() + self.period
        return True

    def rest(self) -> float:
        """Seconds until the next sign of life."""
        return max(0.0, self._next - self._now())

    def watch(self, others: Iterable[int]) -> None:
        self._heard.update(dict.fromkeys(others, self._now()))

    def hear(self, other: int) -> None:
        if other in self._heard:
            self._heard[other] = self._now()

    def forget(self, other: int) -> None:
        """``other`` has left."""
        self._heard.pop(other, None)

    def silent(self, part: float = 1.0) -> list[int]:
        """Who has given no sign of life for ``part`` of the timeout."""
        now = self._now()
        return [other for other, heard in self._heard.items() if now - heard > part * self.timeout]

    def _now(self) -> float:
        last, self._last = self._last, time.monotonic()
        self._ticks += min(self._last - last, 2 * self.period)
        return self._ticks
