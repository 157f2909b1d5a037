"""What a session has published, in an order that is the same for all ranks.

Entry ``n`` is the key ``log/n``, which only the first one who claims it can set. So all ranks see the same entries up to the same end: a
failure (of any rank), or the end that rank 0 sets when it has left. Nothing comes after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from shardsave._ranks.failures import Failure
from shardsave._ranks.store_connection import StoreConnection

PUBLISHED, FAILURE, END = b"p", b"f", b"e"


class Entry(NamedTuple):
    """``phase``: what a value belongs to."""

    position: int
    kind: bytes
    phase: int
    value: bytes

    @property
    def last(self) -> bool:
        return self.kind != PUBLISHED

    def packed(self) -> bytes:
        return self.kind + b"%d " % self.phase + self.value


def unpack_entry(position: int, packed: bytes) -> Entry:
    phase, _, value = packed[1:].partition(b" ")
    return Entry(position, packed[:1], int(phase), value)


class Log:
    """The entries of one session, read and written by one rank."""

    def __init__(self, line: StoreConnection, session: str) -> None:
        self._line = line
        self._prefix = f"{session}/log"
        self.length = 0
        self.ended = False
        self.ended_here = False
        self._last: Entry | None = None
        self._keys: list[str] = []

    def read(self) -> Entry | None:
        """The next entry, if there is one."""
        if self.ended:
            return None
        packed = self._line.peek(self._key(self.length))
        return None if packed is None else self._fetched(packed)

    def take(self, entry: Entry) -> bool:
        """Notes an entry that came from another rank. Returns whether it is the next one."""
        if self.ended or entry.position != self.length:
            return False
        self._keys.append(self._key(self.length))
        self.length += 1
        self.ended = entry.last
        self._last = entry
        return True

    def append(self, kind: bytes, phase: int, value: bytes) -> tuple[Entry, bool]:
        """Adds an entry if nobody has added one at its place. Returns the entry that is there, and whether it is the new one."""
        key = self._key(self.length)
        stowed = self._line.stow(key, value) if kind == PUBLISHED else b"=" + value  # only rank 0 adds long ones
        packed = kind + b"%d " % phase + stowed
        found = self._line.claim(key, packed)
        if found == packed:
            entry = Entry(self.length, kind, phase, value)
            self.take(entry)
            self._keys += StoreConnection.parts(key, stowed)
            return entry, True
        self._line.delete(StoreConnection.parts(key, stowed))
        return self._fetched(found or b""), False

    def fail(self, failure: Failure, hear: Callable[[], None] = lambda: None) -> Iterator[Entry]:
        """Ends the log with ``failure``, unless it has ended. Yields the entries that were not yet read, and the last one.

        ``hear``: takes what was sent to this rank, for one without which the log may be deleted. Whoever deletes it has sent all of it to
        everybody before. So if this rank can set an entry, and then hears that there is one at its place, it has set it where the log was.
        """
        while not self.ended:
            mine, key = Entry(self.length, FAILURE, 0, failure.packed()), self._key(self.length)
            packed = FAILURE + b"0 =" + mine.value
            found = self._line.claim(key, packed)
            if found != packed:
                yield self._fetched(found or b"")
                continue
            hear()
            if self.length == mine.position:
                self.ended_here = self.take(mine)
                yield mine
            elif self._last != mine:
                self._line.delete([key])

    def keys(self) -> list[str]:
        """The keys of all entries."""
        while self.read() is not None:
            pass
        return self._keys

    def _key(self, position: int) -> str:
        return f"{self._prefix}/{position}"

    def _fetched(self, packed: bytes) -> Entry:
        key = self._key(self.length)
        short = unpack_entry(self.length, packed)
        entry = short._replace(value=self._line.fetched(key, short.value))
        self.take(entry)
        self._keys += StoreConnection.parts(key, short.value)
        return entry
