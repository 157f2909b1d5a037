"""The lowest rank of a host: it speaks with the store for all ranks of the host.

Rank 0 also gathers from all hosts, publishes, and watches the other leaders.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from shardsave._ranks.failures import Failure
from shardsave._ranks.heartbeat import Pulse
from shardsave._ranks.log import END, PUBLISHED, Entry
from shardsave._ranks.mailbox import Mailbox
from shardsave._ranks.participant import BEAT, ENTRY, HELLO, LEFT, READ, STORE_LOST, VALUE, Participant, Timeouts
from shardsave._ranks.polling import PollIntervals, pauses_for
from shardsave._ranks.rendezvous import Met
from shardsave._ranks.sockets import Listener, Message, Peer, Waiter
from shardsave._ranks.store_connection import StoreConnection
from shardsave._ranks.values import pack, unpack

_LEFT = b"left"
#: How many seconds a leader that leaves waits for members that do not read.
_PATIENCE = 5.0


class Leader(Participant):
    def __init__(
        self, line: StoreConnection, met: Met, names: tuple[int, ...], rank: int, timeouts: Timeouts, mailbox: Mailbox
    ) -> None:
        super().__init__(line, met, names, rank, timeouts, mailbox)
        self._listener = Listener(self.address)
        self._waiter = Waiter(mailbox.bell, self._listener)
        self._peers = self._waiter.peers
        self._gone: set[int] = set()
        self._members = Pulse(timeouts.rank)
        self._hosts = Pulse(timeouts.rank, () if rank == 0 else (0,))
        self._beats: dict[int, bytes] = {}
        self._beat = 0
        self._pauses = pauses_for(met.hosts) if met.hosts > 1 else PollIntervals(self._members.period, self._members.period)
        self._entries: list[Entry] = []
        self._values: dict[int, dict[int, bytes]] = {}
        self._set: dict[int, list[str]] = {}
        self._awaited: int | None = None
        self._leave_by = 0.0
        if met.roll is not None:
            self._hosts.watch(range(1, met.hosts))
            self.publish(0, met.roll.packed())
            for gone, interrupted in met.gone:
                self.fail(self.interrupted(gone) if interrupted else self.lost(gone, "it gave up waiting"))

    # -- what the session wants

    def value(self, phase: int, value: bytes) -> None:
        if self.rank == 0:
            self._awaited = phase
        self._take_value(phase, self.rank, value)

    def publish(self, phase: int, value: bytes) -> None:
        won = False
        while not won and not self.log.ended:
            entry, won = self.log.append(PUBLISHED, phase, value)
            self.deliver(entry)

    def close(self) -> None:
        self.closing = True
        self._leave_by = time.monotonic() + _PATIENCE
        if self.rank == 0:
            while not self.log.ended:
                self.deliver(self.log.append(END, 0, b"")[0])

    # -- the life of a leader

    def step(self) -> None:
        """Does what is to be done now, and waits until there is more."""
        if self._members.due():
            self._give_beats()
            self._watch()
        if self._pauses.due():
            self._look()
        for ready in self._waiter.wait(min(self._members.rest(), self._pauses.rest())):
            if isinstance(ready, Listener):
                for peer in ready.accept():
                    self._waiter.add(peer)
                    self._hear(peer)
            else:
                self._hear(ready)

    def may_leave(self) -> bool:
        """Whether nobody needs this rank any more."""
        if not self.closing:
            return False
        reached = self._reached() if self.log.ended else set()
        if self.roll is not None and set(self._own()) <= self._gone | reached | {self.rank}:
            return True
        return self.log.ended and time.monotonic() > self._leave_by

    @property
    def buries(self) -> bool:
        return super().buries or bool(self._unreached())

    def leave(self) -> None:
        """The last leader that leaves deletes all keys, if nobody may want to read them any more."""
        keeps = bool(self.lost_leaders() or self._unreached())
        for peer in self._peers:
            peer.send(Message(LEFT, 0, b""))
        self._delete_set()
        if self.rank:
            self.line.set(self.key(f"beat/{self.met.host}"), _LEFT)
        if not keeps and self.line.add(self.key("left"), 1) == self.met.hosts:
            self.line.delete(self.keys())

    def _reached(self) -> set[int]:
        """To whom all was sent."""
        return {peer.rank for peer in self._peers if peer.flushed}

    def _unreached(self) -> set[int]:
        """The ranks of this host that live, and to which the end of the log could not be sent: they were stopped for long."""
        living = set(self._own()) - self._gone | {peer.rank for peer in self._peers}
        return living - self._reached() - {self.rank, -1}

    def lose_store(self) -> None:
        """Tells the members that the store is lost."""
        for peer in self._peers:
            peer.send(Message(STORE_LOST, 0, b""))

    def shut(self) -> None:
        """Closes all descriptors."""
        self._listener.close()
        for peer in self._peers:
            peer.close()

    def deliver(self, entry: Entry) -> None:
        super().deliver(entry)
        if (failure := self.mailbox.failure) is not None:
            self._gone.update(failure.lost)  # also who gave up before it came here: nobody waits for it when this rank leaves
        self._entries.append(entry)
        message = _message(entry)
        for peer in self._peers:
            peer.send(message)
        self._expect()
        if not entry.last:
            self._delete_set(entry.phase)
        if entry.position == 0 and self.roll is not None:
            self._members.watch(rank for rank in self._own() if rank != self.rank)
            for phase in list(self._values):
                self._pass_on(phase)

    # -- its members

    def _hear(self, peer: Peer) -> None:
        peer.flush()
        for message in peer.receive():
            self._obey(peer, message)
        if peer.ended:
            self._waiter.remove(peer)
            peer.close()
            if peer.rank >= 0 and peer.rank not in self._gone:
                self._miss(self.lost(peer.rank, "its process has ended"))

    def _obey(self, peer: Peer, message: Message) -> None:
        if message.kind == HELLO:
            peer.rank = message.number
            for entry in self._entries:
                peer.send(_message(entry))
        elif message.kind == VALUE:
            self._take_value(message.number, peer.rank, message.value)
        elif message.kind == READ:
            self._pauses.restart()
        elif message.kind == LEFT:
            self._gone.add(peer.rank)
            self._members.forget(peer.rank)
        self._members.hear(peer.rank)

    def _take_value(self, phase: int, rank: int, value: bytes) -> None:
        self._values.setdefault(phase, {})[rank] = value
        self._expect()
        self._pass_on(phase)

    def _pass_on(self, phase: int) -> None:
        """Gives the values of this host to rank 0, as soon as they are complete."""
        own = self._own()
        values = self._values[phase]
        if not own or len(values) < len(own):
            return
        if self.rank == 0:
            self._collect()
            return
        key = self.key(f"up/{phase}/{self.met.host}")
        stowed = self.line.stow(key, pack([values[rank] for rank in own]))
        self.line.set(key, stowed)
        self.line.add(self.key(f"count/{phase}"), 1)
        self._set[phase] = [key, *StoreConnection.parts(key, stowed), self.key(f"count/{phase}")]
        del self._values[phase]

    def _delete_set(self, phase: int | None = None) -> None:
        """Deletes what was given to rank 0 up to ``phase``: it has gone on since. Deleting twice does no harm."""
        for given in [given for given in self._set if phase is None or given <= phase]:
            self.line.delete(self._set.pop(given))

    def _own(self) -> Sequence[int]:
        return [] if self.roll is None else self.roll.ranks_of(self.met.host)

    # -- the store

    def _expect(self) -> None:
        """Something of other hosts may come soon. What comes from this host does not come by the store."""
        if self.met.hosts > 1:
            self._pauses.restart()

    def _look(self) -> None:
        """Reads what is new in the store."""
        while (entry := self.log.read()) is not None:
            self.deliver(entry)
        if self._awaited is not None:
            self._collect()

    def _collect(self) -> None:
        """On rank 0: looks whether all hosts have given their values of the phase that is awaited."""
        phase = self._awaited
        own = self._own()
        if phase is None or not own or len(self._values.get(phase, ())) < len(own):
            return
        others = range(1, self.met.hosts)
        count = self.key(f"count/{phase}")
        if others and int(self.line.peek(count) or b"0") < len(others):
            return
        keys = [self.key(f"up/{phase}/{host}") for host in others]
        values = dict(self._values.pop(phase))
        for host, key, stowed in zip(others, keys, self.line.get_all(keys), strict=True):
            assert self.roll is not None
            values.update(zip(self.roll.ranks_of(host), unpack(self.line.fetched(key, stowed or b"=")), strict=True))
        self._awaited = None
        self.mailbox.gathered[phase] = [values[rank] for rank in range(len(self.names))]
        self.mailbox.news.put(None)

    def late(self) -> list[int]:
        """Whose values of the awaited phase have not come: single ranks of this host, all of another one."""
        if self._awaited is None or self.roll is None:
            return []
        late = [rank for rank in self._own() if rank not in self._values.get(self._awaited, ())]
        hosts = [host for host in range(1, self.met.hosts) if not self.line.has([self.key(f"up/{self._awaited}/{host}")])]
        return late + [rank for host in hosts for rank in self.roll.ranks_of(host)]

    def _give_beats(self) -> None:
        for peer in self._peers:
            peer.send(Message(BEAT, 0, b""))
        if self.met.hosts > 1:
            self._beat += 1
            self.line.set(self.key(f"beat/{self.met.host}"), b"%d" % self._beat)

    def _watch(self) -> None:
        """Looks for members and leaders that give no signs of life."""
        self._look()  # who was stopped for long may find that all is over, and the beats deleted
        if self.log.ended:
            return
        if self.met.hosts > 1:
            others = range(1, self.met.hosts) if self.rank == 0 else range(1)
            beats = self.line.get_all([self.key(f"beat/{host}") for host in others])
            for host, beat in zip(others, beats, strict=True):
                if beat == _LEFT:
                    self._hosts.forget(host)
                elif beat is not None and beat != self._beats.get(host):
                    self._beats[host] = beat
                    self._hosts.hear(host)
        for rank in self._members.silent():
            self._miss(self.silent(rank))
        for host in self._hosts.silent():
            self._miss(self.silent(self.roll.leaders()[host] if self.roll is not None else 0))

    def _miss(self, failure: Failure) -> None:
        self._gone.update(failure.lost)
        self.fail(failure)


def _message(entry: Entry) -> Message:
    return Message(ENTRY, entry.position, entry.packed())
