"""Releases the pages of mapped files while a conversion reads them, since they count as memory of the process."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap

from shardsave._storage.mapping import let_go

#: Pages are released whenever this many bytes of the new checkpoint have been written. A cast may read four times as many as it writes.
_HELD_BYTES = 16 << 20


class ReleaseWhileReading:
    """A callback for the number of bytes just read. After enough bytes it releases the pages of the mapped files."""

    def __init__(self, mappings: tuple[mmap, ...]) -> None:
        self._mappings = mappings
        self._held = 0

    def __call__(self, count: int) -> None:
        self._held += count
        if self._held >= 4 * _HELD_BYTES:
            self._held = 0
            let_go(self._mappings)


class ReleaseWhileWriting:
    """A progress callback that passes each call on to ``tick``. After enough bytes it releases the pages of the mapped files."""

    def __init__(self, mappings: tuple[mmap, ...], tick: Callable[[int], object]) -> None:
        self._mappings = mappings
        self._tick = tick
        self._released_at = 0

    def __call__(self, done: int, total: int = 0) -> None:
        if done - self._released_at >= _HELD_BYTES:
            let_go(self._mappings)
            self._released_at = done
        self._tick(done)
