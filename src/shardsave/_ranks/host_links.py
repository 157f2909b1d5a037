"""The links of an exchange within a host: unix sockets that carry small messages, and one descriptor, that of the windows.

The end of a connection is noticed at once, so the death of a rank is too.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardsave._engine.transfer import BLOCK_BYTES
from shardsave._ranks.links import Callbacks, Lost
from shardsave._ranks.windows import MESSAGE_BYTES, SharedMemory, is_same_user, receive, send_descriptor
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

#: The kinds of messages. To an owner: "I am rank n", "I am done with block n". From it: "there are n windows" (with their descriptor),
#: "block n is open in window m", "there are no more". Either way: "I leave, the session will say why".
_HELLO, _DONE, _WINDOWS, _OPEN, _END, _LEAVE = range(6)
_MESSAGE = struct.Struct("=iqq")

#: Of this many owners or fewer, a rank uses most of each window, so all pages are mapped at once; of more, small parts of each.
_FEW = 8

#: Pauses between attempts to connect to a rank that does not listen yet, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class _Owner:
    """The connection to another rank that owns blocks. ``window``: its memory, from its first message on."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.socket: socket.socket | None = None
        self.window: SharedMemory | None = None
        self.next_attempt, self.pause = 0.0, _FIRST_PAUSE
        self.ended = self.left = False


class _Peer:
    """A connection from another rank, which takes part in blocks of this one."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank = -1
        self.left = False


class HostLinks:
    """``owners``: the ranks of this host to connect to. ``listens``: whether they may connect to this one.

    Threads: one of its own, on which `Exchange.work_in` and `Exchange.done` are called. `open` and `end` may be called from any thread.
    """

    def __init__(self, exchange: Callbacks, session: Session, owners: Sequence[int], *, listens: bool) -> None:
        self.lost: dict[int, Lost] = {}
        self._exchange = exchange
        self._session = session
        self._owners = [_Owner(rank) for rank in owners]
        here = session.hosts[session.rank]
        self._expected = session.hosts.count(here) - 1 if listens else 0
        self._listener: socket.socket | None = None
        self._memory: SharedMemory | None = None
        self._token = b""
        self._lock = threading.Lock()
        self._peers: dict[int, _Peer] = {}  # by rank; guarded by the lock, as are the two below
        self._waiting: dict[int, list[bytes]] = {}  # for ranks that have not connected yet
        self._no_more = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._selector: selectors.BaseSelector | None = None
        self._sockets: list[socket.socket] = []
        self._alarm: socket.socket | None = None
        self._alarmed: socket.socket | None = None

    @staticmethod
    def new_token() -> bytes:
        """A name for the sockets of one exchange, which no other process can know."""
        return os.urandom(16).hex().encode()

    @property
    def ended(self) -> bool:
        """Whether all owners have said that there are no more blocks, and no rank will still try to connect to this one."""
        return all(owner.ended for owner in self._owners) and len(self._peers) == self._expected

    def start(self, token: bytes, memory: SharedMemory | None) -> None:
        """Listens, and begins to connect. ``token``: from `new_token`, the same on all ranks."""
        if not self._owners and not self._expected:
            return
        self._token, self._memory = token, memory
        self._selector = selectors.DefaultSelector()
        self._alarm, self._alarmed = socket.socketpair()
        self._selector.register(self._alarmed, selectors.EVENT_READ)
        if self._expected:
            self._listener = self._new_socket()
            self._listener.bind(self._name(self._session.rank))
            self._listener.listen(4096)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        _open.add(self)
        self._thread = threading.Thread(target=self._run, name="shardsave-exchange", daemon=True)
        self._thread.start()

    def open(self, rank: int, block: int, window: int) -> None:
        """Tells ``rank`` that a window is open for it."""
        self._tell(rank, _MESSAGE.pack(_OPEN, block, window))

    def end(self) -> None:
        """Tells all ranks that no more windows will be opened."""
        with self._lock:
            self._no_more = True
            for peer in self._peers.values():
                self._send(peer.socket, _MESSAGE.pack(_END, 0, 0))

    def close(self) -> None:
        """Ends the connections. Says that this rank leaves, where others may still wait for it."""
        self._closing = True
        if self._alarm is not None:
            self._send(self._alarm, b"x")
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.send(_MESSAGE.pack(_LEAVE, 0, 0), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            connection.close()
        for end in (self._alarm, self._alarmed):
            if end is not None:
                end.close()
        if self._selector is not None:
            self._selector.close()
        if self._thread is not None and self._thread.is_alive():
            return  # it may still work in the windows
        for owner in self._owners:
            if owner.window is not None:
                owner.window.close()

    def _name(self, rank: int) -> str:
        """An abstract name (unix(7)): it needs no directory, and vanishes with its socket."""
        return f"\0shardsave-{self._token.decode()}-{rank}"

    def _new_socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._sockets.append(made)
        return made

    def _run(self) -> None:
        try:
            while not self._closing:
                pause = self._connect()
                assert self._selector is not None
                for key, _ in self._selector.select(pause):
                    if key.data is not None and not self._closing:
                        key.data()
        except BaseException as error:
            if not self._closing:
                self._exchange.fail(error)

    def _connect(self) -> float | None:
        """Tries to connect to owners that have not been reached. Returns how long to wait for the next attempt; None: all are reached."""
        now, pauses = time.monotonic(), []
        for owner in self._owners:
            if owner.socket is not None:
                continue
            if now >= owner.next_attempt and self._reached(owner):
                continue
            pauses.append(max(0.0, owner.next_attempt - now))
        return min(pauses, default=None)

    def _reached(self, owner: _Owner) -> bool:
        connection = self._new_socket()
        try:
            connection.connect(self._name(owner.rank))
        except (ConnectionRefusedError, BlockingIOError):  # it does not listen yet, or many connect to it
            self._sockets.remove(connection)
            connection.close()
            owner.next_attempt = time.monotonic() + owner.pause
            owner.pause = min(2 * owner.pause, _LONGEST_PAUSE)
            return False
        if not is_same_user(connection):
            raise ShardSaveError(
                f"a process of the same user was expected to listen as {self._session.name(owner.rank)}, another user's does"
            )
        owner.socket = connection
        self._send(connection, _MESSAGE.pack(_HELLO, self._session.rank, 0))
        assert self._selector is not None
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear_owner(owner))
        return True

    def _accept(self) -> None:
        assert self._listener is not None and self._selector is not None
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        if not is_same_user(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._sockets.append(connection)
        peer = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear_peer(peer))

    def _hear_peer(self, peer: _Peer) -> None:
        message = self._receive(peer.socket)
        if message is None:
            return
        if not message:
            self._gone(peer.socket, peer.rank, peer.left, expected=self._no_more or peer.rank < 0)
            return
        kind, number, _ = _MESSAGE.unpack(message)
        if kind == _HELLO:
            self._add_peer(peer, number)
        elif kind == _DONE:
            self._exchange.done(peer.rank, number)
        elif kind == _LEAVE:
            peer.left = True

    def _add_peer(self, peer: _Peer, rank: int) -> None:
        peer.rank = rank
        nbytes = self._memory.nbytes if self._memory is not None else 0
        with self._lock:
            if self._memory is not None:
                with contextlib.suppress(ConnectionError):
                    send_descriptor(peer.socket, _MESSAGE.pack(_WINDOWS, nbytes, 0), self._memory.file.fd)
            for message in self._waiting.pop(rank, []):
                self._send(peer.socket, message)
            if self._no_more:
                self._send(peer.socket, _MESSAGE.pack(_END, 0, 0))
            self._peers[rank] = peer
        self._exchange.wake()

    def _hear_owner(self, owner: _Owner) -> None:
        assert owner.socket is not None
        message = self._receive(owner.socket, owner)
        if message is None:
            return
        if not message:
            self._gone(owner.socket, owner.rank, owner.left, expected=owner.ended)
            return
        kind, number, window = _MESSAGE.unpack(message)
        if kind == _OPEN:
            assert owner.window is not None
            self._exchange.work_in(owner.rank, number, owner.window.address + window * BLOCK_BYTES)
            self._send(owner.socket, _MESSAGE.pack(_DONE, number, 0))
        elif kind == _END:
            owner.ended = True
            self._exchange.wake()
        elif kind == _LEAVE:
            owner.left = True

    def _receive(self, connection: socket.socket, owner: _Owner | None = None) -> bytes | None:
        """One message; empty at the end of the connection; None if there is none now."""
        try:
            message, file = receive(connection)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""
        if file is not None:
            if owner is None:
                file.abandon()
            else:
                owner.window = SharedMemory(file, _MESSAGE.unpack(message)[1], populate=len(self._owners) <= _FEW)
        return message

    def _gone(self, connection: socket.socket, rank: int, said: bool, *, expected: bool) -> None:
        assert self._selector is not None
        self._selector.unregister(connection)
        if not expected:
            self.lost[rank] = Lost(rank, said)
            self._exchange.wake()

    def _tell(self, rank: int, message: bytes) -> None:
        with self._lock:
            peer = self._peers.get(rank)
            if peer is None:
                self._waiting.setdefault(rank, []).append(message)
            else:
                self._send(peer.socket, message)

    def _send(self, connection: socket.socket, message: bytes) -> None:
        """Never waits: no more messages are under way than there are windows. The end of a connection is noticed by who listens."""
        with contextlib.suppress(ConnectionError):
            connection.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def abandon(self) -> None:
        """In a forked child, whose copies would hide the death of its parent from the other ranks."""
        for connection in self._sockets:
            connection.close()


#: The links of this process that may be open.
_open: weakref.WeakSet[HostLinks] = weakref.WeakSet()


def _abandon_in_child() -> None:
    for links in list(_open):
        links.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)

#: How long `close` waits for the thread, which may be at work in a window, in seconds.
_JOIN_SECONDS = 10.0

assert _MESSAGE.size <= MESSAGE_BYTES
