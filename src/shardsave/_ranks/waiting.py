"""How the thread that uses a session waits for the thread of the session."""

from __future__ import annotations

import time

from shardsave._ranks.arrivals import Call
from shardsave._ranks.failures import StoreLost
from shardsave._ranks.session_thread import SessionThread
from shardsave.errors import ShardSaveError

#: Seconds between two looks at the time.
TICK = 0.1


class Stall:
    """Notices a call of the store that does not return: the process that serves it is stopped, or cannot be reached."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._call: tuple[int, float] | None = None
        self._seconds = 0.0
        self._looked = 0.0

    def lasts(self, call: tuple[int, float] | None) -> bool:
        """Whether ``call`` has been the running one for the limit; time in which this process did not run counts little."""
        now = time.monotonic()
        if call is None or call != self._call:
            self._call, self._seconds = call, 0.0
        else:
            self._seconds += min(now - self._looked, max(1.0, self._limit / 4))
        self._looked = now
        return self._seconds > self._limit


def join(post: SessionThread, seconds: float, stall: Stall) -> None:
    """Waits until the thread has ended, unless the store does not answer it."""
    end = time.monotonic() + seconds
    while not post.join(TICK) and time.monotonic() < end and not stall.lasts(post.line.call):
        pass


def trouble_of(post: SessionThread, usual: type[ShardSaveError], stall: Stall, call: Call) -> Exception | None:
    """The error of the job, as far as this rank knows."""
    mailbox = post.mailbox
    if mailbox.failure is not None:
        return mailbox.failure.error(usual)
    if mailbox.broken is not None:
        return usual(f"cannot {call}: {type(mailbox.broken).__name__}: {mailbox.broken}")
    lost = mailbox.lost
    if lost is not None or stall.lasts(post.line.call):
        error = StoreLost("the store of torch.distributed does not answer: rank 0 or the agent that serves it was lost")
        error.__cause__ = lost
        return error
    return None
