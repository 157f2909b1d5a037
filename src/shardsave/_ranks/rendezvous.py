"""How the ranks of a call find each other.

Each rank sets `arrived/<rank>` with a token that it has made up, and waits for `answer/<token>`; rank 0 waits for all and answers. A rank
that gives up takes its token back and looks once more for an answer. So neither a call that failed nor one that a rank made alone
disturbs the next one. A rank that is interrupted leaves `interrupted/<rank>` until it makes its next call: the others learn why it is
missing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from shardsave._ranks.arrivals import SAVE, Answered, Arrival, Call, Elsewhere, all_met, key_of, waiting_elsewhere
from shardsave._ranks.claims import saved_apart
from shardsave._ranks.failures import Failure, unpacked
from shardsave._ranks.group import Host, Members
from shardsave._ranks.polling import pauses_for
from shardsave._ranks.store_connection import StoreConnection
from shardsave._ranks.topology import Topology, listed

_BATCH = 64
#: So many times the limit the other ranks wait for rank 0.
_PATIENCE = 1.25
#: How often they look within the limit which ranks have come, to name the others.
_LOOKS = 8


class Met(NamedTuple):
    """What a rank is answered: the name of the session, its host, the rank that leads this host, the number of hosts.

    ``roll`` is known to rank 0 alone; ``gone``: who gave up while it was answered, and whether it was interrupted.
    """

    session: str
    host: int
    leader: int
    hosts: int
    roll: Topology | None = None
    gone: tuple[tuple[int, bool], ...] = ()


class NotMet(Exception):
    """There will be no session."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Rendezvous:
    """One rank on its way into a session. Everything runs on the thread of the session."""

    def __init__(
        self,
        line: StoreConnection,
        members: Members,
        host: Host,
        call: Call,
        number: int,
        seconds: float,
        given_up: Callable[[], bool],
    ) -> None:
        """``number``: of the call, see `number_of_call`."""
        self._line = line
        self._members = members
        self._call = call
        self._seconds = seconds
        self._given_up = given_up
        self._pauses = pauses_for(len(members.names))
        # the others hear the verdict of rank 0 before they give up, if they have come at the same time
        self._end = time.monotonic() + seconds * (1 if members.rank == 0 else _PATIENCE)
        self._number = number
        self._mine = Arrival(os.urandom(8).hex(), call.digest, *host, str(number), call.kind)
        self._place = members.key, call.kind, members.rank

    def meet(self) -> Met:
        """Raises NotMet, with the same failure on all ranks that have come."""
        if self._place in _interrupted:
            self._line.delete([self._key("interrupted", self._members.rank)])
            _interrupted.discard(self._place)
        met = self._lead() if self._members.rank == 0 else self._follow()
        all_met(self._members, self._number)
        self._line.delete(_graves.pop(self._place, []))
        return met

    def bury(self, keys: list[str]) -> None:
        """Keys that a rank may still want to read that is taken for lost: they are deleted when all ranks have met again."""
        _graves.setdefault(self._place, []).extend(keys)

    def leave(self) -> None:
        """Removes what this rank has set."""
        if self._members.rank:
            self._line.delete([self._key("arrived", self._members.rank), self._key("called", self._members.rank)])

    def _key(self, name: str, rank: int) -> str:
        return key_of(name, self._call.kind, rank)

    def _follow(self) -> Met:
        self._line.set(self._key("called", self._members.rank), json.dumps(self._call).encode())
        self._line.set(self._key("arrived", self._members.rank), self._mine.packed())
        key = f"answer/{self._mine.token}"
        came: set[int] = set()
        next_look = time.monotonic() + self._seconds / _LOOKS
        while (answer := self._line.peek(key)) is None and not self._late():
            time.sleep(self._pauses.rest())
            self._pauses.due()
            if time.monotonic() > next_look:
                came |= self._present()  # who came earlier leaves earlier
                next_look = time.monotonic() + self._seconds / _LOOKS
        if answer is None:
            came |= self._present()
            self._tell_of_interrupt()
            self.leave()
            answer = self._line.peek(key)  # rank 0 may have answered in the meantime: then it knows nothing of our leaving
        if answer is None:
            raise NotMet(self._did_not_come([rank for rank in range(len(self._members.names)) if rank not in came]))
        self._line.delete([key])
        kind, _, text = answer.partition(b" ")
        if kind == b"failure":
            self.leave()
            raise NotMet(unpacked(text))
        session, host, leader, hosts = text.decode().split()
        return Met(session, int(host), int(leader), int(hosts))

    def _present(self) -> set[int]:
        """Who is waiting for rank 0. In a large group nobody looks, for all would do so at once."""
        size = len(self._members.names)
        return {rank for rank in range(1, size) if size > _BATCH or self._line.has([self._key("arrived", rank)])}

    def _tell_of_interrupt(self) -> None:
        """Tells the others, if this rank leaves because it was interrupted."""
        if self._given_up():
            _interrupted.add(self._place)
            self._line.set(self._key("interrupted", self._members.rank), self._mine.token.encode())

    def _interrupt_of(self, rank: int) -> bytes | None:
        return self._line.peek(self._key("interrupted", rank))

    def _did_not_come(self, missing: list[int], meanwhile: str = "") -> Failure:
        interrupted = [rank for rank in missing[:_BATCH] if self._interrupt_of(rank) is not None]
        names = listed([self._members.names[rank] for rank in interrupted or missing])
        if interrupted:
            return Failure("", f"{names} {'was' if len(interrupted) == 1 else 'were'} interrupted")
        ranks = [self._members.names[rank] for rank in missing]
        apart = saved_apart(self._line, self._call.where, ranks, self._seconds) if self._call.verb == SAVE else ""
        return Failure(
            "",
            f"cannot {self._call}: all {len(self._members.names)} ranks of the group were expected to call it within "
            f"rank_timeout={self._seconds:g} s, {names} did not, or ended{meanwhile}; the call is collective: either all ranks make it "
            f"or none{apart}",
        )

    def _waiting_elsewhere(self, missing: list[int], answered: Answered) -> str:
        """Which of the ``missing`` ranks wait in calls of other kinds, in words: on rank 0, which alone knows whom it has answered."""
        calls: dict[str, list[int]] = {}
        for rank in missing[:_BATCH]:
            for arrival in waiting_elsewhere(self._line, self._call, rank, answered):
                calls.setdefault(self._called(rank, arrival), []).append(self._members.names[rank])
        return "".join(f"; meanwhile, {listed(ranks)} waited for all ranks to {call}" for call, ranks in calls.items())

    def _called(self, rank: int, arrival: Arrival) -> str:
        """What ``rank`` called when it arrived."""
        text = self._line.peek(key_of("called", arrival.kind, rank))
        return Call(*json.loads(text)).words if text else "?"

    def _lead(self) -> Met:
        answered = _answered.setdefault(self._members.key, Answered())
        arrivals = self._arrivals(answered)
        failure = self._disagreement(arrivals)
        if self._given_up():
            self._tell_of_interrupt()
            failure = Failure("", f"rank {self._members.names[0]} was interrupted")
        elif failure is None and (missing := [rank for rank in range(len(self._members.names)) if rank not in arrivals]):
            failure = self._did_not_come(missing, self._waiting_elsewhere(missing, answered))
        for rank, arrival in arrivals.items():
            answered.note(rank, arrival)
        if failure is not None:
            self._answer(arrivals, dict.fromkeys(arrivals, b"failure " + failure.packed()))
            raise NotMet(failure)
        return self._open(arrivals)

    def _arrivals(self, answered: Answered) -> dict[int, Arrival]:
        """Who has come within the time, in order; also those who wait in a call of another kind and cannot come to this one."""
        arrivals = {0: self._mine}
        elsewhere = Elsewhere(self._line, self._call, self._number, answered)
        for rank in range(1, len(self._members.names)):
            if (arrival := self._awaited(rank, answered, elsewhere)) is not None:
                arrivals[rank] = arrival
                self._pauses.restart()
        return arrivals

    def _awaited(self, rank: int, answered: Answered, elsewhere: Elsewhere) -> Arrival | None:
        """The arrival of ``rank``; None if it does not come within the time, or is interrupted meanwhile."""
        kind = self._call.kind
        arrival = answered.waiting(self._line, kind, rank)
        before = self._interrupt_of(rank) if arrival is None else None  # in an earlier call
        while arrival is None and not self._late():
            time.sleep(self._pauses.rest())
            self._pauses.due()
            arrival = answered.waiting(self._line, kind, rank) or elsewhere.look(rank)
            if arrival is None and self._interrupt_of(rank) not in (None, before):
                return None
        return arrival

    def _disagreement(self, arrivals: dict[int, Arrival]) -> Failure | None:
        others = [rank for rank, arrival in arrivals.items() if arrival.call != self._call.digest]
        if not others:
            return None
        calls: dict[str, list[int]] = {}
        for rank in others:
            calls.setdefault(self._called(rank, arrivals[rank]), []).append(self._members.names[rank])
        same = [self._members.names[rank] for rank in arrivals if rank not in others]
        told = "; ".join(f"{listed(ranks)}: {call}" for call, ranks in [(self._call.words, same), *calls.items()])
        return Failure(
            "ValueError",
            f"cannot {self._call}: all ranks were expected to make the same call, found {told}; nothing was read or written",
        )

    def _open(self, arrivals: dict[int, Arrival]) -> Met:
        """Answers all ranks that there is a session."""
        hosts = {arrival.host: 0 for arrival in arrivals.values()}
        hosts = {host: number for number, host in enumerate(hosts)}
        names = {hosts[arrival.host]: arrival.host_name for arrival in arrivals.values()}
        roll = Topology(tuple(hosts[arrival.host] for arrival in arrivals.values()), tuple(names.values()), self._members.names)
        session, leaders = os.urandom(8).hex(), roll.leaders()
        self._line.set_all({f"{session}/beat/{host}": b"0" for host in range(len(hosts))})
        texts = {
            rank: f"session {session} {host} {leaders[host]} {len(hosts)}".encode() for rank, host in enumerate(roll.hosts)
        }
        return Met(session, 0, 0, len(hosts), roll, self._answer(arrivals, texts))

    def _answer(self, arrivals: dict[int, Arrival], texts: Mapping[int, bytes]) -> tuple[tuple[int, bool], ...]:
        """Gives each rank its answer. Returns those that have left in the meantime, and whether they were interrupted."""
        others = [rank for rank in arrivals if rank]
        keys = {rank: f"answer/{arrivals[rank].token}" for rank in others}
        self._line.set_all({keys[rank]: texts[rank] for rank in others})
        arrived = {rank: key_of("arrived", arrivals[rank].kind, rank) for rank in others}
        batches = [others[begin : begin + _BATCH] for begin in range(0, len(others), _BATCH)]
        unsure = [rank for batch in batches if not self._line.has([arrived[rank] for rank in batch]) for rank in batch]
        gone = [rank for rank in unsure if self._line.peek(arrived[rank]) is None]
        self._line.delete([keys[rank] for rank in gone])
        return tuple((rank, self._interrupt_of(rank) == arrivals[rank].token.encode()) for rank in gone)

    def _late(self) -> bool:
        return time.monotonic() > self._end or self._given_up()


#: By group.
_answered: dict[str, Answered] = {}
#: By group, kind of call and rank: keys of sessions that ended with the loss of a rank.
_graves: dict[tuple[str, str, int], list[str]] = {}
#: By group, kind of call and rank: this process has told that it was interrupted.
_interrupted: set[tuple[str, str, int]] = set()
os.register_at_fork(after_in_child=_answered.clear)
os.register_at_fork(after_in_child=_interrupted.clear)
os.register_at_fork(after_in_child=_graves.clear)
