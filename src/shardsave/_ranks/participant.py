"""What leaders and members have in common: the log, and the messages between them."""

from __future__ import annotations

from typing import NamedTuple

from shardsave._ranks.failures import Failure
from shardsave._ranks.log import Entry, Log
from shardsave._ranks.mailbox import Mailbox
from shardsave._ranks.rendezvous import Met
from shardsave._ranks.store_connection import StoreConnection
from shardsave._ranks.topology import Topology, unpack_topology

# Kinds of messages. From a member: who it is, a value, "I have left". From a leader: an entry of the log, "the store is lost".
HELLO, VALUE, LEFT, ENTRY, STORE_LOST = 1, 2, 3, 4, 5
# From both: a sign of life. From a member: "read the log".
BEAT, READ = 6, 7


class Timeouts(NamedTuple):
    """In seconds: without a sign of life; for a phase."""

    rank: float
    phase: float


class Participant:
    """A rank's part in a session, run by one thread. `Leader` and `Member` are the two kinds."""

    def __init__(
        self, line: StoreConnection, met: Met, names: tuple[int, ...], rank: int, timeouts: Timeouts, mailbox: Mailbox
    ) -> None:
        self.line = line
        self.met = met
        self.names = names
        self.rank = rank
        self.timeouts = timeouts
        self.mailbox = mailbox
        self.log = Log(line, met.session)
        self.roll: Topology | None = None
        self.closing = False

    @property
    def address(self) -> str:
        return f"shardsave/{self.met.session}/{self.met.host}"

    def name(self, rank: int) -> str:
        return self.roll.name(rank) if self.roll is not None else f"rank {self.names[rank]}"

    def lost(self, rank: int, reason: str) -> Failure:
        return Failure("", f"{self.name(rank)} was lost: {reason}", (rank,))

    def interrupted(self, rank: int) -> Failure:
        return Failure("", f"{self.name(rank)} was interrupted", (rank,))

    def silent(self, rank: int) -> Failure:
        return self.lost(rank, f"a sign of life was expected within rank_timeout={self.timeouts.rank:g} s, there was none")

    def fail(self, failure: Failure) -> None:
        """Makes ``failure`` the end of the session, unless it has ended."""
        for entry in self.log.fail(failure):
            self.deliver(entry)

    @property
    def buries(self) -> bool:
        """Whether a rank may wake up and read the log, so that its keys must stay until all have met again. One leader says so."""
        return self.log.ended_here and bool(self.lost_leaders())

    def lost_leaders(self) -> set[int]:
        """The leaders that are lost: they may wake up, and read the log."""
        failure = self.mailbox.failure
        leaders = self.roll.leaders() if self.roll is not None else [0]
        return set(failure.lost if failure is not None else ()) & set(leaders)

    def keys(self) -> list[str]:
        """All keys of the session that no single rank deletes."""
        beats = [self.key(f"beat/{host}") for host in range(self.met.hosts)]
        return [*self.log.keys(), *beats, self.key("left")]

    def key(self, name: str) -> str:
        return f"{self.met.session}/{name}"

    def deliver(self, entry: Entry) -> None:
        """Takes an entry that `log` has taken."""
        if entry.position == 0 and not entry.last:
            self.roll = unpack_topology(entry.value, self.names)
        self.mailbox.deliver(entry)
