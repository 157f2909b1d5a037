"""What rank 0 decides one turn ahead, without a job: two ranks in one process, over a store in memory."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from shardsave import SaveNotCommittedError, ShardSaveError
from shardsave._ranks.decisions import Decision, Decisions
from shardsave._ranks.group import Members


def pair(store: dist.Store, patience: float = 30.0) -> tuple[Decisions, Decisions]:
    first, second = (Decisions(store, Members(rank, (4, 7), "key"), "run", 1, patience) for rank in range(2))
    return first, second


def test_others_wait_until_rank_0_has_passed() -> None:
    """Catches a rank that reads an older decision than that of the call before, or goes on without one."""
    leader, other = pair(dist.HashStore())
    assert other.of(0) == Decision()
    found: list[Decision] = []
    thread = threading.Thread(target=lambda: found.append(other.of(2)))
    thread.start()
    leader.announce(Decision(1, 2, ("SIGTERM",)))
    time.sleep(0.1)
    assert not found
    leader.announce(Decision(3, 4))  # rank 0 may be ahead
    thread.join(30)
    assert found == [Decision(3, 4)] and other.of(1) == found[0]


def test_a_wait_has_an_end() -> None:
    """Catches a rank that hangs if rank 0 does not make the same calls, and an error that does not say so."""
    leader, other = pair(dist.HashStore(), 0.05)
    leader.announce(Decision(1))
    with pytest.raises(
        SaveNotCommittedError,
        match=r"rank 4 was expected within phase_timeout=0\.05 s to have finished 5 calls .* it has finished 1",
    ):
        other.of(5)


def test_a_store_that_is_lost() -> None:
    """Catches ranks that are told different things by the loss of one store, and an error after a save that says it was not made."""
    leader, other = pair(dist.HashStore())
    for line in (leader._line, other._line):
        line.close()
    ends = []
    for call in (lambda: other.of(1), lambda: other.tell(["SIGTERM"]), lambda: leader.announce(Decision(1)), leader.told):
        with pytest.raises(
            ShardSaveError, match="cannot tell which steps all ranks save to run: .* were committed stay$"
        ) as caught:
            call()
        ends.append((type(caught.value), str(caught.value)))
    assert len(set(ends)) == 1 and ends[0][0] is ShardSaveError


def test_signals_are_told_once() -> None:
    """Catches a signal that rank 0 does not learn of, and one that is written into the store at every step."""
    leader, other = pair(dist.HashStore())
    assert leader.told() == []
    other.tell(["SIGTERM"])
    calls = other._line.calls
    other.tell(["SIGTERM"])
    assert leader.told() == ["SIGTERM"] and other._line.calls == calls


def test_the_last_one_removes_the_keys() -> None:
    """Catches keys that stay in the store of a long job, or go before all ranks have read them."""
    store = dist.HashStore()
    leader, other = pair(store)
    leader.announce(Decision(1, 2))
    leader.leave()
    assert other.of(1) == Decision(1, 2)
    other.tell(["SIGTERM"])
    other.leave()
    assert store.num_keys() == 0
