"""What ranks learn of the end of a session that they hear late: its log is deleted once it has ended."""

from __future__ import annotations

import time
from unittest import mock

import pytest
from test_session import held_member, leftovers, meet_all, open_session

from jobs import run_ranks
from shardsave._ranks import group as groups
from shardsave._ranks import leader
from shardsave._ranks.log import FAILURE
from shardsave._ranks.store_connection import StoreConnection
from shardsave.errors import OutOfSpaceError


def fail_where_the_log_was(rank: int, rank_0_fails: bool) -> tuple[str, list[bytes], list[str]]:
    """Rank 1 has an error, and is about to write it into the log, when rank 0 ends the session and deletes the log."""
    claim, store = StoreConnection.claim, groups.job_store()

    def late_claim(line: StoreConnection, key: str, value: bytes, expected: bytes = b"") -> bytes | None:
        if rank == 1 and "/log/" in key and value.startswith(FAILURE):
            store.set("rank 1 claims", b"")
            while any("/log/" in name for name in leftovers()):
                time.sleep(0.001)
        return claim(line, key, value, expected)

    error, decisions = "", []
    with mock.patch.object(StoreConnection, "claim", late_claim):
        try:
            with open_session(rank) as session:
                session.exchange("values", b"")
                if rank == 1:
                    decided = session._post.mailbox.published
                    raise OutOfSpaceError("second")
                while not store.check(["rank 1 claims"]):
                    time.sleep(0.001)
                if rank_0_fails:
                    raise OutOfSpaceError("first")
                session.publish("decision", b"yes")
        except OutOfSpaceError as raised:
            error = str(raised)
        if rank == 1:
            decisions = [value[4:] for value in decided.values()]
    meet_all(rank)
    return error, decisions, leftovers()


@pytest.mark.parametrize("rank_0_fails", [True, False])
def test_an_error_that_comes_where_the_log_was(rank_0_fails: bool) -> None:
    """Catches a rank that ends a session for itself that has ended otherwise, does not learn what was published last, or leaves a key."""
    leads, follows = run_ranks(2, fail_where_the_log_was, rank_0_fails)
    assert leads == (("rank 0: first" if rank_0_fails else ""), [], [])
    assert follows == (("rank 0: first", [], []) if rank_0_fails else ("rank 1: second", [b"yes"], []))


def sleep_at_the_end(rank: int) -> tuple[bool, bool, list[str]]:
    """Rank 1 reads nothing while rank 0 publishes more than a socket holds, and leaves."""
    decision = b"yes" * (1 << 20)
    with held_member() as held, mock.patch.object(leader, "_PATIENCE", 0.1):
        with open_session(rank) as session:
            session.exchange("values", b"")
            if rank == 1:
                held.stops.set()
                session._post.mailbox.bell.ring()
                held.stands.wait()
            meet_all(rank)
            if rank == 0:
                session.publish("decision", decision)
                session.close()
            meet_all(rank)
            held.stops.clear()
            held.goes_on.set()
            knows = rank == 0 or session.publish("decision") == decision
        stays = bool(leftovers())
        meet_all(rank)
        with open_session(rank):
            pass
    meet_all(rank)
    return knows, stays, leftovers()


def test_a_rank_that_hears_the_end_late() -> None:
    """Catches a rank that was stopped while the others ended the call, and that takes rank 0 for lost when it wakes up: what was published
    must stay until it can be read, and no longer."""
    assert run_ranks(2, sleep_at_the_end) == [(True, True, [])] * 2
