"""Gives back the memory of mapped files while a conversion reads them: their pages count as memory of the process."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap

from shardsave._storage.mapping import let_go

#: Bytes of the new checkpoint after which the pages read so far are given back: a cast may read four times as many.
_HELD_BYTES = 16 << 20


class ReleaseWhileReading:
    """Called with the number of bytes just read; now and then gives back the memory of the mapped files that they came from."""

    def __init__(self, mappings: tuple[mmap, ...]) -> None:
        self._mappings = mappings
        self._held = 0

    def __call__(self, count: int) -> None:
        self._held += count
        if self._held >= 4 * _HELD_BYTES:
            self._held = 0
            let_go(self._mappings)


class ReleaseWhileWriting:
    """A progress callback: now and then gives back the memory of the mapped files, and passes each tick on to ``tick``."""

    def __init__(self, mappings: tuple[mmap, ...], tick: Callable[[int], object]) -> None:
        self._mappings = mappings
        self._tick = tick
        self._released_at = 0

    def __call__(self, done: int, total: int = 0) -> None:
        if done - self._released_at >= _HELD_BYTES:
            let_go(self._mappings)
            self._released_at = done
        self._tick(done)
