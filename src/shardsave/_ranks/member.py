"""A rank that is not the lowest of its host: everything goes over its leader, as long as that lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from shardsave._ranks.failures import Failure, StoreLost
from shardsave._ranks.heartbeat import Pulse
from shardsave._ranks.log import unpack_entry
from shardsave._ranks.mailbox import Mailbox
from shardsave._ranks.participant import BEAT, ENTRY, HELLO, LEFT, READ, STORE_LOST, VALUE, Participant, Timeouts
from shardsave._ranks.rendezvous import Met
from shardsave._ranks.sockets import Message, Peer, Waiter, connect
from shardsave._ranks.store_connection import StoreConnection

#: Seconds between two attempts to reach a leader that does not listen yet.
_RETRY = 0.002


class Member(Participant):
    def __init__(
        self, line: StoreConnection, met: Met, names: tuple[int, ...], rank: int, timeouts: Timeouts, mailbox: Mailbox
    ) -> None:
        super().__init__(line, met, names, rank, timeouts, mailbox)
        self._waiter = Waiter(mailbox.bell)
        self._leader: Peer | None = None
        self._pulse = Pulse(timeouts.rank, (met.leader,))
        self._values: list[Message] = []

    def value(self, phase: int, value: bytes) -> None:
        message = Message(VALUE, phase, value)
        if self._leader is None:
            self._values.append(message)
        else:
            self._leader.send(message)

    def publish(self, phase: int, value: bytes) -> None:
        raise AssertionError("rank 0 leads its host")

    def fail(self, failure: Failure) -> None:
        if self._leader is None and not self.log.ended:
            with suppress(OSError):  # interrupted on its way: the leader hears of it at once, and does not wait for this rank
                self._connect()
        self._receive()  # the call may have ended, and the store with it
        with self._unless_ended():
            for entry in self.log.fail(failure, hear=self._receive):
                self.deliver(entry)
        if self._leader is not None:
            self._leader.send(Message(READ, 0, b""))

    def close(self) -> None:
        self.closing = True

    def step(self) -> None:
        """Does what is to be done now, and waits until there is more."""
        if self._leader is None and not self.log.ended:
            self._connect()
        if self._pulse.due():
            if self._leader is not None:
                self._leader.send(Message(BEAT, 0, b""))
            self._watch()
        rest = self._pulse.rest() if self._leader is not None or self.log.ended else _RETRY
        self._waiter.wait(rest)
        if self._leader is not None and not self._leader.ended:
            self._receive()
            if self._leader.ended and not self.log.ended:
                self.fail(self.lost(self.met.leader, "its process has ended"))

    def may_leave(self) -> bool:
        return self.closing and (self._leader is None or self._leader.flushed)

    def leave(self) -> None:
        if self._leader is not None:
            self._leader.send(Message(LEFT, 0, b""))

    def lose_store(self) -> None:
        """The others see it themselves."""

    def shut(self) -> None:
        """Closes all descriptors."""
        if self._leader is not None:
            self._leader.close()

    def _connect(self) -> None:
        connection = connect(self.address)
        if connection is None:
            return
        self._leader = Peer(connection, self.met.leader)
        self._waiter.add(self._leader)
        for message in (Message(HELLO, self.rank, b""), *self._values):
            self._leader.send(message)
        self._values.clear()

    def _receive(self) -> None:
        """Takes what the leader has sent."""
        leader = self._leader
        if leader is None or leader.ended:
            return
        leader.flush()
        for message in leader.receive():
            self._pulse.hear(self.met.leader)
            if message.kind == ENTRY:
                entry = unpack_entry(message.number, message.value)
                if self.log.take(entry):
                    self.deliver(entry)
            elif message.kind == STORE_LOST:
                raise StoreLost("as the leader of this host found")
            elif message.kind == LEFT:
                self._pulse.forget(self.met.leader)
        if leader.ended:
            self._waiter.remove(leader)

    def _watch(self) -> None:
        """A leader that is silent for long: somebody may have noticed it already."""
        if self.log.ended:
            return
        if self._pulse.silent(0.5):
            with self._unless_ended():
                while (entry := self.log.read()) is not None:
                    self.deliver(entry)
        if self._pulse.silent():
            self.fail(self.silent(self.met.leader))

    @contextmanager
    def _unless_ended(self) -> Iterator[None]:
        """The store, or an entry in it, may be gone because the call has ended: then the leader has told it before."""
        try:
            yield
        except StoreLost:
            self._receive()
            if not self.log.ended:
                raise
