"""Opens sessions: the ranks of a group meet, and the call has an end on all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import TYPE_CHECKING

from shardsave._common.job_errors import mark, mark_own
from shardsave._common.shutdown import raise_if_ending
from shardsave._ranks import group as groups
from shardsave._ranks.arrivals import Call, number_of_call
from shardsave._ranks.failures import JobFailed, StoreLost, failure_of, is_foreign
from shardsave._ranks.participant import Timeouts
from shardsave._ranks.session import STALL, TELLING, Session, end_unheld
from shardsave._ranks.session_lock import SessionLock
from shardsave._ranks.session_thread import SessionThread
from shardsave._ranks.topology import Topology, unpack_topology
from shardsave._ranks.waiting import TICK, Stall, join, trouble_of
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def session_of(
    group: ProcessGroup,
    verb: str,
    where: str,
    *,
    rank_timeout: float,
    phase_timeout: float,
    apart: str = "",
    raises: type[ShardSaveError] = ShardSaveError,
    state: str = "",
) -> Iterator[Session]:
    """A session from `begin` to its end. ``raises``: the class of errors that have no class of their own; ``state`` ends their message."""
    try:
        session = begin(
            group, verb, where, rank_timeout=rank_timeout, phase_timeout=phase_timeout, usual=JobFailed, apart=apart
        )
        try:
            with session:
                yield session
        finally:
            session.abandon()  # after an interrupt at the first instruction of `__exit__`
    except (JobFailed, StoreLost) as error:
        words = str(error)
        failed = words if words.startswith("cannot ") else f"cannot {verb} {where}: {words}"
        raised = raises(f"{failed}{state}")
        raised.__cause__ = error
        mark(raised)
        raise raised from raised.__cause__
    except Exception as error:
        (mark_own if is_foreign(error) else mark)(error)
        raise


def begin(
    group: ProcessGroup,
    verb: str,
    where: str,
    *,
    rank_timeout: float = 120.0,
    phase_timeout: float = 1800.0,
    usual: type[ShardSaveError] = ShardSaveError,
    apart: str = "",
) -> Session:
    """Meets the other ranks of ``group``, which call the same ``verb`` about the same ``where``.

    ``usual``: the class of errors that have no class of their own. ``apart``: sessions that may run beside others of the same group, such
    as those of saves in the background, have another word here on all ranks.
    """
    members = groups.members_of(group)
    timeouts = Timeouts(rank_timeout, phase_timeout)
    return begin_with(groups.job_store(), members, groups.this_host(), Call(verb, where, apart), timeouts, usual)


def begin_with(
    store: groups.Store,
    members: groups.Members,
    host: groups.Host,
    call: Call,
    timeouts: Timeouts,
    usual: type[ShardSaveError] = ShardSaveError,
) -> Session:
    """`begin` with a given store and host."""
    if len(members.names) == 1:
        return Session(None, call, Topology((0,), (host.name,), members.names), 0, timeouts, usual)
    thread = threading.current_thread()
    number = number_of_call(members, on_main_thread=thread is threading.main_thread())
    ticket = SessionLock(members, call.kind, f"{call} on thread '{thread.name}'")
    post = None
    try:
        if (running := ticket.take()) is not None:
            raise usual(
                f"cannot {call}: one collective call of a group at a time was expected, this process is in: {running}; wait until that "
                f"has ended"
            )
        try:
            post = SessionThread(store, members, host, call, number, timeouts)
            post.start()
        except (OSError, RuntimeError) as error:
            raise usual(
                f"cannot {call}: rank {members.names[members.rank]} was expected to have a thread and a descriptor free: {error}"
            ) from error
        roll = unpack_topology(_first(post, timeouts, usual, call), members.names)
        return Session(post, call, roll, members.rank, timeouts, usual, ticket)
    except BaseException as error:
        end_unheld(post, ticket, failure_of(error, f"rank {members.names[members.rank]}"))
        if post is not None:
            join(post, TELLING, Stall(TELLING))
        raise


def _first(post: SessionThread, timeouts: Timeouts, usual: type[ShardSaveError], call: Call) -> bytes:
    """Waits until the ranks have met. Returns what rank 0 published first."""
    stall = Stall(timeouts.rank * STALL)
    while 0 not in post.mailbox.published:
        raise_if_ending()
        if (error := trouble_of(post, usual, stall, call)) is not None:
            raise error
        with suppress(Empty):
            post.mailbox.news.get(timeout=TICK)
    return post.mailbox.published.pop(0)
