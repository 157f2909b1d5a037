"""A connection of our own to the store of the job: no call of it waits for a key, and each says when it began.

One thread uses it. A call blocks as long as the process that serves the store is stopped: so other threads look at
`StoreConnection.stalled_call`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from shardsave._ranks.failures import StoreLost
from shardsave._ranks.group import Store, is_refused

#: A TCPStore refuses messages of more than 8 MiB, and breaks the connection.
_PART = 1 << 20
_INLINE = 1 << 14
_BATCH = 64
#: So many seconds a connection may take until somebody looks whether the store is served at all; each further look comes later.
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
#: What `compare_set` returns for a key that is not there: values never begin with it.
_NOTHING = b"-"


#: The connection of this process to each store. It lives as long as the store: for every new one torch asks the name service for the
#: names of both ends, in the only thread of the store's server too, and all ranks wait for as long as no answer comes.
_connections: weakref.WeakKeyDictionary[Store, Store] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_connections.clear)


def _connected(store: Store) -> Store:
    """A new connection to ``store``. Raises StoreLost as soon as nobody serves it any more: torch would try again and again, for as long as
    the store's own timeout, which may be half an hour. The thread that does so ends then; no end of the process waits for it.
    """
    made: SimpleQueue[Store | RuntimeError] = SimpleQueue()

    def connect() -> None:
        try:
            made.put(store.clone())
        except RuntimeError as error:
            made.put(error)

    threading.Thread(target=connect, name="shardsave-connect", daemon=True).start()
    pause = _PAUSE
    while True:
        try:
            connection = made.get(timeout=pause)
        except Empty:
            if is_refused(store):
                raise StoreLost("nobody serves it any more") from None
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if isinstance(connection, RuntimeError):
                raise connection
            return connection


class StoreConnection:
    """Keys under ``prefix`` in a clone of ``store``, from `open` to `close`. Every method raises StoreLost."""

    def __init__(self, store: Store, prefix: str) -> None:
        #: The running call: its number and when it began. None between calls.
        self.call: tuple[int, float] | None = None
        self.calls = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self._prefix = prefix + "/"
        self._original = store
        self._store: Store | None = None

    def open(self) -> None:
        """Makes the connection, or takes that of an earlier session."""
        self._store = self._original
        with self._called() as store:
            self._store = _connections.get(store) or _connected(store)
        _connections[store] = self._store

    def beside(self, prefix: str) -> StoreConnection:
        """A line over the same connection, for keys under another prefix."""
        line = StoreConnection(self._original, prefix)
        line._store = self._store
        return line

    def close(self) -> None:
        self._store = None

    def give_up(self) -> None:
        """The connection is broken, or blocked for ever: later sessions make a new one. Any thread may call it."""
        _connections.pop(self._original, None)

    def set(self, key: str, value: bytes) -> None:
        with self._called(len(key) + len(value)) as store:
            store.set(self._prefix + key, value)

    def set_all(self, values: Mapping[str, bytes]) -> None:
        keys = list(values)
        for begin in range(0, len(keys), _BATCH):
            batch = keys[begin : begin + _BATCH]
            with self._called(sum(len(key) + len(values[key]) for key in batch)) as store:
                store.multi_set(self._full(batch), [values[key] for key in batch])

    def peek(self, key: str) -> bytes | None:
        """The value of ``key``, or None."""
        return self.claim(key, _NOTHING, _NOTHING)

    def claim(self, key: str, value: bytes, expected: bytes = b"") -> bytes | None:
        """Sets ``key`` if it is not there. Returns what it has then."""
        with self._called(len(key) + len(value)) as store:
            found = store.compare_set(self._prefix + key, expected, value)
        self.received_bytes += len(found)
        return None if found == _NOTHING else found

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of ``keys`` are there."""
        with self._called(sum(map(len, keys))) as store:
            return store.check(self._full(keys))

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """The values of ``keys``, with None where there is nothing. `multi_get` would wait for a key that is deleted meanwhile."""
        return [self.peek(key) for key in keys]

    def add(self, key: str, number: int) -> int:
        with self._called(len(key) + 8) as store:
            return store.add(self._prefix + key, number)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            with self._called(len(key)) as store:
                store.delete_key(self._prefix + key)

    def stow(self, key: str, value: bytes) -> bytes:
        """What is to be the value of ``key``: ``value`` itself, or, if it is long, how many parts of it were set beside ``key``."""
        if len(value) <= _INLINE:
            return b"=" + value
        parts = [value[begin : begin + _PART] for begin in range(0, len(value), _PART)]
        for number, part in enumerate(parts):
            self.set(f"{key}/{number}", part)
        return b"%d" % len(parts)

    def fetched(self, key: str, stowed: bytes) -> bytes:
        """The value that `stow` was given."""
        if stowed[:1] == b"=":
            return stowed[1:]
        parts = [part for name in self.parts(key, stowed) for part in self.get_all([name]) if part is not None]
        if len(parts) != int(stowed):
            raise StoreLost(f"{stowed.decode()} parts of {key} were expected, {len(parts)} are there")
        return b"".join(parts)

    @staticmethod
    def parts(key: str, stowed: bytes) -> list[str]:
        """The keys beside ``key``."""
        return [] if stowed[:1] == b"=" else [f"{key}/{number}" for number in range(int(stowed))]

    def _full(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]

    @contextmanager
    def _called(self, sent: int = 0) -> Iterator[Store]:
        self.calls += 1
        self.sent_bytes += sent
        self.call = (self.calls, time.monotonic())
        try:
            if self._store is None:
                raise StoreLost("the connection is closed")
            yield self._store
        except RuntimeError as error:  # all errors of a store are
            self.give_up()
            raise StoreLost(str(error).partition("\n")[0]) from error  # torch adds the trace of its C++ code
        finally:
            self.call = None
