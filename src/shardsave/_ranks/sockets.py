"""Messages between the ranks of one host: a leader listens at an abstract Unix socket, its members are connected to it.

One thread uses an object of this module; `Bell.ring` may be called by any.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_HEAD = struct.Struct("<BQQ")
_CHUNK = 1 << 18
_BACKLOG = 1024


class Message(NamedTuple):
    """``kind``: one of the letters below. ``number``: the number of a phase, of an entry of the log, or of a rank."""

    kind: int
    number: int
    value: bytes


class Bell:
    """Wakes the thread that waits for messages. It may be closed when no thread uses it any more."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _open.add(self)

    def ring(self) -> None:
        if self.fd >= 0:
            with suppress(OSError):
                os.eventfd_write(self.fd, 1)

    def quiet(self) -> None:
        with suppress(OSError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class Peer:
    """One connection. ``rank``: who is at the other end, as soon as that is known."""

    def __init__(self, connection: socket.socket, rank: int = -1) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = rank
        self.ended = False
        self._received = bytearray()
        self._unsent = bytearray()
        _open.add(self)

    @property
    def flushed(self) -> bool:
        return self.ended or not self._unsent

    def send(self, message: Message) -> None:
        self._unsent += _HEAD.pack(message.kind, message.number, len(message.value))
        self._unsent += message.value
        self.flush()

    def flush(self) -> None:
        """Sends what the connection takes now."""
        try:
            while self._unsent and not self.ended:
                with memoryview(self._unsent) as view:
                    sent = self.connection.send(view[:_CHUNK])
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # what the other end sent before it ended is still to be read

    def receive(self) -> list[Message]:
        """The messages that have come. Sets ``ended`` when there will be no more."""
        try:
            while data := self.connection.recv(_CHUNK):
                self._received += data
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        return list(self._messages())

    def _messages(self) -> Iterator[Message]:
        begin = 0
        while len(self._received) - begin >= _HEAD.size:
            kind, number, length = _HEAD.unpack_from(self._received, begin)
            if len(self._received) - begin - _HEAD.size < length:
                break
            begin += _HEAD.size
            yield Message(kind, number, bytes(self._received[begin : begin + length]))
            begin += length
        del self._received[:begin]

    def close(self) -> None:
        self.connection.close()


class Listener:
    """The socket of a leader."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind("\0" + address)
        self.socket.listen(_BACKLOG)
        self.socket.setblocking(False)
        _open.add(self)

    def accept(self) -> list[Peer]:
        """New connections of processes of this user."""
        peers = []
        with suppress(BlockingIOError):
            while True:
                connection, _ = self.socket.accept()
                _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if user == os.geteuid():
                    peers.append(Peer(connection))
                else:
                    connection.close()
        return peers

    def close(self) -> None:
        self.socket.close()


def connect(address: str) -> socket.socket | None:
    """A connection to the leader at ``address``; None if it does not listen yet. Raises OSError: it is out of reach, for example."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connection.connect("\0" + address)
    except (ConnectionRefusedError, BlockingIOError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


class Waiter:
    """Waits for the bell, for messages of `peers`, and for room to send. What is waited for stays registered: of 64 peers few are ready."""

    def __init__(self, bell: Bell, listener: Listener | None = None) -> None:
        self.peers: dict[Peer, int] = {}  # and what each is registered for
        self._bell = bell
        self._selector = selectors.PollSelector()  # has no descriptor of its own
        self._selector.register(bell.fd, selectors.EVENT_READ, bell)
        if listener is not None:
            self._selector.register(listener.socket, selectors.EVENT_READ, listener)

    def add(self, peer: Peer) -> None:
        self.peers[peer] = _events(peer)
        self._selector.register(peer.connection, self.peers[peer], peer)

    def remove(self, peer: Peer) -> None:
        """Called before ``peer`` is closed."""
        del self.peers[peer]
        self._selector.unregister(peer.connection)

    def wait(self, seconds: float) -> list[Peer | Listener]:
        """What is ready, after ``seconds`` at most."""
        for peer, events in self.peers.items():
            if events != (wanted := _events(peer)):
                self.peers[peer] = wanted
                self._selector.modify(peer.connection, wanted, peer)
        ready = [key.data for key, _ in self._selector.select(seconds)]
        if self._bell in ready:
            self._bell.quiet()
        return [one for one in ready if one is not self._bell]


def _events(peer: Peer) -> int:
    return selectors.EVENT_READ | (0 if peer.flushed else selectors.EVENT_WRITE)


#: Everything of this process that may be open. A forked child closes its copies: else the death of its parent would go unnoticed.
_open: weakref.WeakSet[Bell | Peer | Listener] = weakref.WeakSet()


def _close_in_child() -> None:
    for opened in list(_open):
        opened.close()


os.register_at_fork(after_in_child=_close_in_child)
