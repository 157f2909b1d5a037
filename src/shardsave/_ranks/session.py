"""One collective call: the ranks of a group meet, tell each other values, and end with the same error if one of them fails.

Only the store of torch.distributed is used, and Unix sockets within a host: no collective, and no group of the caller. Each session has a
thread of its own (`session_thread.py`): signs of life are given while the caller computes, and no call waits longer than its limit.
"""

from __future__ import annotations

import os
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from types import TracebackType
from typing import TypeVar

from shardsave._common.job_errors import is_common
from shardsave._common.shutdown import raise_if_ending
from shardsave._common.words import some
from shardsave._ranks.arrivals import Call
from shardsave._ranks.failures import Failure, StoreLost, failure_of, is_foreign
from shardsave._ranks.mailbox import Command
from shardsave._ranks.participant import Timeouts
from shardsave._ranks.session_lock import SessionLock
from shardsave._ranks.session_thread import SessionThread
from shardsave._ranks.topology import Topology
from shardsave._ranks.values import pack, unpack
from shardsave._ranks.waiting import TICK, Stall, join, trouble_of
from shardsave.errors import SaveCancelledError, ShardSaveError

_T = TypeVar("_T")

#: Bytes of the checksum of a phase's name, which come before its values.
_NAME = 4
#: What is said of ranks that do not take the step that others take.
_AT_ANOTHER_STEP = "at another step of the call: the options of the ranks, or their versions of shardsave, differ"
#: So many ranks are named that the others wait for.
_MOST_NAMES = 20
#: How many seconds a rank that was interrupted waits until the others have been told.
TELLING = 1.0
#: The part of the time without a sign of life that one call of the store may take.
STALL = 0.5


class Session:
    """What the ranks of one call have in common: made by `begin`, used by one thread; `check` and `report_loss` by any.

    ``names``: the number of each rank in the job. ``hosts``: the number of each rank's host; ranks of one host may share memory.

    As a context manager it ends the call: an error of one rank is raised on all, and nothing of the session is left.
    """

    def __init__(
        self,
        post: SessionThread | None,
        call: Call,
        roll: Topology,
        rank: int,
        timeouts: Timeouts,
        usual: type[ShardSaveError],
        ticket: SessionLock | None = None,
    ) -> None:
        self.rank = rank
        self.size = len(roll.names)
        self.names = roll.names
        self.hosts = roll.hosts
        self.leads = rank == 0
        self.timeouts = timeouts
        #: Also called again and again while this rank waits for others; may raise, which fails the call.
        self.watch: Callable[[], None] | None = None
        self._roll = roll
        self._call = call
        self._usual = usual
        self._post = post
        self._phase = 0
        self._error: Exception | None = None
        self._stall = Stall(timeouts.rank * STALL)
        self._ticket = ticket
        self._process = os.getpid()
        interrupted = Failure("", f"{roll.name(rank)} was interrupted")
        self._finalizer = weakref.finalize(self, end_unheld, post, ticket, interrupted)
        self._finalizer.atexit = False

    def name(self, rank: int) -> str:
        """``rank 3``: its number in the job, and its machine where there are several."""
        return self._roll.name(rank)

    # -- values

    def exchange(self, what: str, mine: bytes) -> list[bytes]:
        """From each rank one value, on all ranks, in order of ranks."""
        values = self.gather(what, mine)
        return unpack(self.publish(what, None if values is None else pack(values)))

    def gather(self, what: str, mine: bytes) -> list[bytes] | None:
        """From each rank one value, on rank 0 alone; None on the others, which do not wait."""
        phase, name = self._next(what)
        if self._post is None:
            return [mine]
        self._post.mailbox.command(Command("value", phase, name + mine))
        if not self.leads:
            return None
        gathered = self._post.mailbox.gathered
        values = self._wait(lambda: gathered.pop(phase, None), what)
        if others := [rank for rank, value in enumerate(values) if value[:_NAME] != name]:
            elsewhere = f"{some(map(self.name, others))} {'is' if len(others) == 1 else 'are'}"
            raise self.fail(self._usual(f"'{what}' was expected of all ranks, {elsewhere} {_AT_ANOTHER_STEP}"), "")
        return [value[_NAME:] for value in values]

    def publish(self, what: str, value: bytes | None = None) -> bytes:
        """The value of rank 0, on all ranks. What one rank has received, no error can hide from another one that lives."""
        phase, name = self._next(what)
        if self._post is None:
            return value or b""
        if self.leads:
            self._post.mailbox.command(Command("publish", phase, name + (value or b"")))
        published = self._post.mailbox.published
        received = self._wait(lambda: published.pop(phase, None), what)
        if received[:_NAME] != name:
            raise self.fail(self._usual(f"'{what}' was expected of {self.name(0)}, which is {_AT_ANOTHER_STEP}"))
        return received[_NAME:]

    @property
    def usual(self) -> type[ShardSaveError]:
        """The class of errors that have no class of their own."""
        return self._usual

    # -- errors

    def end_with(self, error: Exception) -> None:
        """``error`` is that of the job: all ranks know it, and are to raise it."""
        self._error = error

    def check(self) -> None:
        """Raises the error of the job if a rank has failed or was lost. Cheap."""
        raise_if_ending()
        if self._process != os.getpid():
            raise RuntimeError(f"cannot {self._call} in a forked process: the call belongs to its parent")
        if self._error is None and self._post is not None:
            self._error = trouble_of(self._post, self._usual, self._stall, self._call)
        if self._error is not None:
            raise self._error

    @contextmanager
    def for_all(self) -> Iterator[None]:
        """What this rank does within the context, it does for all, or all do the same: an error of ours then names no rank."""
        try:
            yield
        except Exception as error:
            of_one = is_foreign(error) or isinstance(error, SaveCancelledError)
            raised = self.fail(error, self.name(self.rank) if of_one else "")
            if raised is error:
                raise
            raise raised from error

    def fail(self, error: BaseException, who: str | None = None) -> BaseException:
        """Ends the call with ``error`` on all ranks, unless it has ended with another one. Returns what is to be raised here: the error
        of the job, or ``error`` itself if it is none of this package's and no rank is lost.

        ``who``: the rank that others are told of, by default this one; empty if the error concerns all ranks alike (`mark_common`).
        """
        if self._post is None or error is self._error or self._process != os.getpid():
            return error
        if self._error is not None and error.__cause__ is self._error:
            return error  # the job's error, in the words of the call
        self.watch = None
        if who is None:
            who = "" if is_common(error) else self.name(self.rank)
        failure = failure_of(error, who)
        self._post.mailbox.command(Command("fail", failure=failure))
        first = self._told(TELLING if not isinstance(error, Exception) else self.timeouts.rank)
        if not isinstance(error, Exception):
            return error
        if first is None:  # all others have left, or cannot be told
            first = failure.error(self._usual)
        self._error = first
        return error if is_foreign(error) and not self._is_lost else first

    def report_loss(self, rank: int, reason: str) -> None:
        """A connection to ``rank`` has ended. Raises the error of the job: that of ``rank``, if it could still tell one."""
        with suppress(_NotInTime):
            self._wait(lambda: None, "the reason", TELLING)
        if self._post is not None:
            failure = Failure("", f"{self.name(rank)} was lost: {reason}", (rank,))
            self._post.mailbox.command(Command("fail", failure=failure))
            self._told(self.timeouts.rank)
        self.check()

    def close(self) -> None:
        """Ends this rank's part. Waits for no other rank, but that the lowest of a host waits for those of its host. Raises nothing."""
        if self._post is None or self._process != os.getpid() or not self._finalizer.alive:
            return
        try:
            self._post.mailbox.command(Command("close"))
            join(self._post, self.timeouts.phase, self._stall)
            if self._ticket is not None:
                self._ticket.give_back()
            self._finalizer.detach()
        finally:
            self.abandon()  # after an interrupt

    def abandon(self) -> None:
        """Ends this rank's part without waiting, unless it has ended: the other ranks are told of an interrupt."""
        if self._process == os.getpid():
            self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        raised = error
        try:
            if error is not None:
                raised = self.fail(error)
            self.close()
        finally:
            self.abandon()  # after an interrupt
        if raised is not None and raised is not error:
            if error is not None and raised is not error.__cause__:
                raise raised from error
            raise raised

    # -- waiting

    def _next(self, what: str) -> tuple[int, bytes]:
        self._phase += 1
        return self._phase, zlib.crc32(what.encode()).to_bytes(_NAME, "little")

    def _wait(self, value: Callable[[], _T | None], what: str, seconds: float | None = None) -> _T:
        """Waits for a value. What has come is taken before an error is looked at."""
        assert self._post is not None
        limit = self.timeouts.phase + (0 if self.leads else self.timeouts.rank)  # rank 0 knows more about who is late
        end = time.monotonic() + (limit if seconds is None else seconds)
        while True:
            over, trouble = self._post.mailbox.over, self._known_trouble()
            if (found := value()) is not None:
                return found
            if trouble is not None:
                raise trouble
            if over and seconds is None:
                raise self.fail(self._usual(f"'{what}' was expected of {self.name(0)}, which has ended the call"))
            if time.monotonic() > end:
                raise _NotInTime if seconds is not None else self.fail(self._late(what), "")
            with suppress(Empty):
                self._post.mailbox.news.get(timeout=TICK)

    def _known_trouble(self) -> Exception | None:
        try:
            self.check()
            if self.watch is not None:
                self.watch()
        except Exception as error:
            return error
        return None

    def _told(self, seconds: float) -> Exception | None:
        """The error of the job, as soon as there is one, within ``seconds``."""
        try:
            self._wait(self._over, "the error", seconds)
        except _NotInTime:
            pass
        except Exception as error:
            return error
        return None

    @property
    def _is_lost(self) -> bool:
        """Whether a rank or the store is lost: what else fails then may be a consequence."""
        failure = self._post.mailbox.failure if self._post is not None else None
        return isinstance(self._error, StoreLost) or (failure is not None and bool(failure.lost))

    def _over(self) -> bool | None:
        return True if self._post is not None and self._post.mailbox.over else None

    def _late(self, what: str) -> ShardSaveError:
        late = [0]
        if self._post is not None and self.leads:
            mailbox = self._post.mailbox
            mailbox.command(Command("late"))
            with suppress(_NotInTime):
                late = self._wait(lambda: mailbox.late, what, TELLING)
        names = some(map(self.name, late), _MOST_NAMES)
        return self._usual(
            f"'{what}' was expected within phase_timeout={self.timeouts.phase:g} s, still waiting for {names}: alive, but stuck or slow; "
            f"pass a longer phase_timeout if it is slow"
        )


class _NotInTime(Exception):
    """A wait was over before what it waited for."""


def end_unheld(post: SessionThread | None, ticket: SessionLock | None, failure: Failure) -> None:
    """Ends a session that nobody holds any more."""
    if ticket is not None:
        ticket.give_back()
    if post is not None:
        post.abandon(Command("fail", failure=failure))
