"""The thread of a session: it alone talks with the store and with the other ranks, also while the session's own thread computes."""

from __future__ import annotations

import threading
from contextlib import suppress

from shardsave._ranks.arrivals import Call
from shardsave._ranks.failures import StoreLost, failure_of
from shardsave._ranks.group import Host, Members, Store
from shardsave._ranks.leader import Leader
from shardsave._ranks.log import Log
from shardsave._ranks.mailbox import Command, Mailbox
from shardsave._ranks.member import Member
from shardsave._ranks.participant import Timeouts
from shardsave._ranks.rendezvous import NotMet, Rendezvous
from shardsave._ranks.store_connection import StoreConnection


class SessionThread:
    """The thread. What it learns comes into ``mailbox``."""

    def __init__(self, store: Store, members: Members, host: Host, call: Call, number: int, timeouts: Timeouts) -> None:
        """``number``: of the call, see `number_of_call`."""
        self.mailbox = Mailbox()
        self.line = StoreConnection(store, f"shardsave/{members.key}")
        self._members = members
        self._host = host
        self._call = call
        self._number = number
        self._timeouts = timeouts
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="shardsave-ranks", daemon=True)
        self._ended = False

    def start(self) -> None:
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended, within so many seconds. Then it needs no descriptor any more."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._ended and not self._thread.is_alive():
            self.mailbox.bell.close()
        return not self._thread.is_alive()

    def abandon(self, command: Command) -> None:
        """Ends the session from outside, with ``command`` first; also one that has not met the others yet."""
        self._abandoned = True
        self.mailbox.command(command)
        self.mailbox.command(Command("close"))

    def _run(self) -> None:
        mailbox = self.mailbox
        try:
            self.line.open()
            seconds, given_up = self._timeouts.rank, lambda: self._abandoned
            meeting = Rendezvous(self.line, self._members, self._host, self._call, self._number, seconds, given_up)
            self._take_part(self.line, meeting)
        except NotMet as error:
            mailbox.failure = error.failure
        except StoreLost as error:
            mailbox.lost = error
        except BaseException as error:
            mailbox.broken = error
        finally:
            self.line.close()
            self._ended = True
            mailbox.news.put(None)

    def _take_part(self, line: StoreConnection, meeting: Rendezvous) -> None:
        met = meeting.meet()
        kind = Leader if met.leader == self._members.rank else Member
        try:
            part = kind(line, met, self._members.names, self._members.rank, self._timeouts, self.mailbox)
        except OSError as error:  # no descriptor is free, for example
            for _ in Log(line, met.session).fail(failure_of(error, f"rank {self._members.names[self._members.rank]}")):
                pass
            raise
        try:
            while True:
                while (command := self.mailbox.take_command()) is not None:
                    _obey(part, command)
                if part.may_leave():
                    break
                part.step()
            if part.buries:
                meeting.bury(part.keys())
            part.leave()
            meeting.leave()
        except StoreLost:
            part.lose_store()
            raise
        except BaseException as error:
            part.fail(failure_of(error, part.name(part.rank)))
            raise
        finally:
            with suppress(OSError):
                part.shut()


def _obey(part: Leader | Member, command: Command) -> None:
    if command.verb == "value":
        part.value(command.phase, command.value)
    elif command.verb == "publish":
        part.publish(command.phase, command.value)
    elif command.verb == "fail" and command.failure is not None:
        part.fail(command.failure)
    elif command.verb == "late" and isinstance(part, Leader):
        part.mailbox.late = part.late()
    elif command.verb == "close":
        part.close()
