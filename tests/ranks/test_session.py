"""Sessions: how ranks meet, what they tell each other, and how all of them learn of one's error."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist

from jobs import Job, run_ranks
from shardsave._ranks import group as groups
from shardsave._ranks.arrivals import Call
from shardsave._ranks.member import Member
from shardsave._ranks.open_session import begin, begin_with, session_of
from shardsave._ranks.participant import Timeouts
from shardsave._ranks.rendezvous import Rendezvous
from shardsave._ranks.session import Session
from shardsave.errors import OutOfSpaceError, SaveNotCommittedError, ShardSaveError


def open_session(rank: int, hosts: int = 1, **options: Any) -> Session:
    """A session of all ranks, which are spread over so many hosts."""
    members = groups.members_of(dist.group.WORLD)
    host = groups.Host(f"host{rank * hosts // len(members.names)}", f"machine{rank * hosts // len(members.names)}")
    timeouts = Timeouts(options.get("rank_timeout", 120.0), options.get("phase_timeout", 60.0))
    return begin_with(groups.job_store(), members, host, Call("save", "ckpt"), timeouts, SaveNotCommittedError)


def leftovers() -> list[str]:
    """The keys of sessions in the store."""
    store = groups.job_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return [key for key in store.list_keys() if "shardsave" in key]


def opened() -> tuple[int, list[str]]:
    return len(os.listdir("/proc/self/fd")), [thread.name for thread in threading.enumerate()]


def meet_all(rank: int) -> None:
    """The ranks wait for each other without a session."""
    dist.barrier()


# -- values


def tell(rank: int, hosts: int) -> object:
    meet_all(rank)
    with open_session(rank, hosts):  # the connection to the store stays
        pass
    before = opened()
    with open_session(rank, hosts) as session:
        values = session.exchange("values", b"%d" % rank * (rank * (1 << 20)))
        gathered = session.gather("others", b"g%d" % rank)
        published = session.publish("decision", b"yes" * (1 << 20) if session.leads else None)
        names = [session.name(other) for other in range(session.size)]
    meet_all(rank)
    gc.collect()
    return [len(value) for value in values], gathered, len(published), session.hosts, names, before == opened(), leftovers()


@pytest.mark.parametrize(("hosts", "table"), [(1, (0, 0, 0, 0)), (2, (0, 0, 1, 1)), (4, (0, 1, 2, 3))])
def test_values(hosts: int, table: tuple[int, ...]) -> None:
    """Catches values that are lost, cut or come in another order, and threads, descriptors and keys that are left."""
    for rank, (values, gathered, published, found, names, same, left) in enumerate(run_ranks(4, tell, hosts)):
        assert values == [0, 1 << 20, 2 << 20, 3 << 20]
        assert gathered == (None if rank else [b"g0", b"g1", b"g2", b"g3"])
        assert (published, found) == (3 << 20, table)
        assert names == [f"rank {other}" + (f" (machine{host})" if hosts > 1 else "") for other, host in enumerate(table)]
        assert same and left == []


def tell_by_file(rank: int, path: str) -> list[bytes]:
    members = groups.members_of(dist.group.WORLD)
    store = dist.FileStore(path, -1)
    with begin_with(
        store, members, groups.Host(f"host{rank}", "machine"), Call("save", "ckpt"), Timeouts(120.0, 60.0)
    ) as session:
        return session.exchange("values", b"%d" % rank * 100_000)


def test_a_store_in_a_file(tmp_path: Path) -> None:
    """Catches calls that only a store over TCP understands."""
    for values in run_ranks(2, tell_by_file, str(tmp_path / "store")):
        assert values == [b"0" * 100_000, b"1" * 100_000]


def tell_in_sub_groups(rank: int) -> object:
    groups_of_two = [dist.new_group([0, 2], backend="gloo"), dist.new_group([1, 3], backend="gloo")]
    lone = dist.new_group([rank], backend="gloo", use_local_synchronization=True)
    with begin(lone, "save", "ckpt") as session:
        alone = session.exchange("values", b"alone"), session.gather("g", b"a"), session.publish("p", b"b")
    with begin(groups_of_two[rank % 2], "save", "ckpt") as session:
        return [session.name(other) for other in range(2)], session.exchange("values", b"%d" % rank), alone


def test_sub_groups() -> None:
    """Catches groups that take each other's values, and ranks that are named by their place in the group."""
    for rank, (names, values, alone) in enumerate(run_ranks(4, tell_in_sub_groups)):
        ranks = (0, 2) if rank % 2 == 0 else (1, 3)
        assert names == [f"rank {other}" for other in ranks] and values == [b"%d" % other for other in ranks]
        assert alone == ([b"alone"], [b"a"], b"b")


def tell_often(rank: int) -> float:
    best = 1e9
    for _ in range(20):
        start = time.perf_counter()
        with open_session(rank) as session:
            session.exchange("values", b"")
        best = min(best, time.perf_counter() - start)
    return best


def test_sessions_in_a_row() -> None:
    """Catches a session that takes what is left of the one before, and one that sleeps where others are waiting."""
    assert max(run_ranks(4, tell_often)) < 0.1


# -- errors


def fail_in_turn(rank: int, cases: list[tuple[int, int, BaseException]]) -> list[tuple[str, str]]:
    """One session for each case: how many hosts, which rank raises (all of them: -1), and what."""
    ends = []
    for hosts, struck, raised in cases:
        try:
            with open_session(rank, hosts) as session:
                session.exchange("values", b"")
                if struck < 0:
                    raise ValueError(f"bad {rank}")
                if rank == struck:
                    raise raised
                while True:
                    session.check()
                    time.sleep(0.01)
        except BaseException as error:
            ends.append((type(error).__name__, str(error)))
    return ends


ERRORS = [
    (OutOfSpaceError("cannot write a: full"), "OutOfSpaceError", "cannot write a: full"),
    (ValueError("bad"), "ValueError", "bad"),
    (ShardSaveError("own"), "SaveNotCommittedError", "own"),
]
#: Errors that no other rank may have the class of.
FOREIGN = [UnicodeError("odd"), RuntimeError("odd")]


def test_an_error() -> None:
    """Catches ranks that end with another error than the one that struck, or in other words."""
    ends = run_ranks(4, fail_in_turn, [(1, 2, error) for error, _, _ in ERRORS])
    assert ends == [[(name, f"rank 2: {text}") for _, name, text in ERRORS]] * 4


def test_a_foreign_error() -> None:
    """Catches an error of the user's code that changes its class where it struck, or that the others cannot tell from one of ours."""
    for rank, ends in enumerate(run_ranks(4, fail_in_turn, [(1, 2, error) for error in FOREIGN])):
        names = [type(error).__name__ for error in FOREIGN]
        told = [("SaveNotCommittedError", f"rank 2: {name}: odd") for name in names]
        assert ends == ([(name, "odd") for name in names] if rank == 2 else told)


class Held(NamedTuple):
    """How a member of a session is made to hear nothing: it ``stops`` at its next step, then it ``stands``, until it ``goes_on``."""

    stops: threading.Event
    stands: threading.Event
    goes_on: threading.Event


@contextmanager
def held_member() -> Iterator[Held]:
    held, step = Held(threading.Event(), threading.Event(), threading.Event()), Member.step

    def late_step(member: Member) -> None:
        if held.stops.is_set():
            held.stands.set()
            held.goes_on.wait()
        else:
            step(member)

    with mock.patch.object(Member, "step", late_step):
        yield held


def fail_after_the_end(rank: int) -> str:
    """Rank 0 fails, leaves and deletes what the session has in the store; what it has told rank 1 is read there only afterwards."""
    error = ""
    with held_member() as held:
        try:
            with open_session(rank) as session:
                session.exchange("values", b"")
                held.stops.set()
                if rank == 1:
                    session._post.mailbox.bell.ring()
                    held.stands.wait()
                meet_all(rank)
                if rank == 0:
                    raise OutOfSpaceError("first")
                while any("/log/" in key for key in leftovers()):
                    time.sleep(0.001)
                threading.Timer(0.05, held.goes_on.set).start()
                raise OutOfSpaceError("second")
        except OutOfSpaceError as raised:
            error = str(raised)
    meet_all(rank)
    return error


def test_a_failure_after_the_end() -> None:
    """Catches a rank with an error of its own, where the call had already ended with that of another rank, which was not read yet."""
    assert run_ranks(2, fail_after_the_end) == ["rank 0: first"] * 2


def test_an_error_on_two_hosts() -> None:
    """Catches an error that does not leave its host, or whose machine nobody learns."""
    ends = run_ranks(4, fail_in_turn, [(2, struck, ValueError("bad")) for struck in range(4)])
    assert ends == [[("ValueError", f"rank {struck} (machine{struck // 2}): bad") for struck in range(4)]] * 4


def test_an_interrupt() -> None:
    """Catches an interrupt that becomes another error where it struck, or that the other ranks do not learn."""
    ends = run_ranks(4, fail_in_turn, [(1, 0, KeyboardInterrupt()), (1, 3, KeyboardInterrupt())])
    for rank in range(4):
        for case, struck in enumerate((0, 3)):
            told = ("SaveNotCommittedError", f"rank {struck} was interrupted")
            assert ends[rank][case] == (("KeyboardInterrupt", "") if rank == struck else told)


def test_errors_on_all_ranks() -> None:
    """Catches ranks that do not agree which of several errors is that of the job."""
    ends = run_ranks(4, fail_in_turn, [(hosts, -1, ValueError()) for hosts in (1, 2, 4) * 3])
    assert ends[1:] == ends[:-1] and {name for name, _ in ends[0]} == {"ValueError"}


def fail_after_decision(rank: int) -> str:
    with open_session(rank) as session:
        if rank == 1:
            session.publish("decision")
            raise ValueError("late")
        if rank > 1:
            time.sleep(0.3)
        decision = session.publish("decision", b"yes" if session.leads else None)
    return decision.decode()


def test_a_decision_before_an_error() -> None:
    """Catches an error of a rank that hides from others what had been published before."""
    with Job(4, fail_after_decision) as job:
        ends = job.ended()
    assert [end.value for end in ends] == ["yes", None, "yes", "yes"] and ends[1].message == "rank 1: late"


def leave_unheld(rank: int) -> None:
    session = open_session(rank)
    session.exchange("values", b"")
    if rank == 1:
        del session
        gc.collect()
        time.sleep(1.0)
        return
    with session:
        session.exchange("more", b"")


def test_a_session_that_nobody_holds() -> None:
    """Catches a rank that was interrupted before it could end its session, and that goes on giving signs of life."""
    with Job(4, leave_unheld) as job:
        ends = job.ended()
    assert ends[1].error is None
    assert {end.message for end in (ends[0], *ends[2:])} == {"rank 1 was interrupted"}


def other_phase(rank: int) -> None:
    with open_session(rank) as session:
        session.exchange("other" if rank == 2 else "values", b"")


def test_another_phase() -> None:
    """Catches values that are taken for those of another phase."""
    with Job(4, other_phase) as job:
        ends = job.ended()
    assert {end.message for end in ends} == {
        "'values' was expected of all ranks, rank 2 is at another step of the call: the options of the ranks, or their versions of "
        "shardsave, differ"
    }


def late_phase(rank: int, hosts: int) -> None:
    with open_session(rank, hosts, phase_timeout=0.5) as session:
        while rank == 3:
            session.check()
            time.sleep(0.01)
        session.exchange("values", b"")


@pytest.mark.parametrize(("hosts", "late"), [(1, "rank 3"), (2, "rank 2 (machine1), rank 3 (machine1)")])
def test_a_phase_that_does_not_end(hosts: int, late: str) -> None:
    """Catches a rank that is alive and never ends its part: who is waited for must be named."""
    with Job(4, late_phase, hosts) as job:
        ends = job.ended()
    (message,) = {end.message for end in ends}
    assert message.startswith(
        f"'values' was expected within phase_timeout=0.5 s, still waiting for {late}: alive, but stuck or slow"
    )


# -- meeting


def come_or_not(rank: int, present: tuple[int, ...]) -> tuple[str, list[bytes], list[str]]:
    said = ""
    meet_all(rank)
    if rank in present:
        with pytest.raises(SaveNotCommittedError) as caught:
            open_session(rank, rank_timeout=0.8)
        said = str(caught.value)
    meet_all(rank)
    with open_session(rank) as session:
        values = session.exchange("values", b"%d" % rank)
    meet_all(rank)
    return said, values, leftovers()


@pytest.mark.parametrize(
    ("present", "missing"), [((0,), "ranks 1 to 3"), ((0, 1, 3), "rank 2"), ((2,), "ranks 0, 1, 3"), ((1, 3), "ranks 0, 2")]
)
def test_ranks_that_do_not_come(present: tuple[int, ...], missing: str) -> None:
    """Catches a collective call of some ranks that hangs, that does not say who is missing, or that disturbs the next call."""
    told = (
        "cannot save ckpt: all 4 ranks of the group were expected to call it within rank_timeout=0.8 s, "
        f"{missing} did not, or ended; the call is collective: either all ranks make it or none"
    )
    for rank, (said, values, left) in enumerate(run_ranks(4, come_or_not, present)):
        assert said == (told if rank in present else "")
        assert values == [b"0", b"1", b"2", b"3"] and left == []


def interrupted_in_the_meeting(rank: int, struck: int, last: int) -> tuple[str, list[bytes], list[str]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    meet_all(rank)
    said = ""
    store = groups.job_store()
    if rank == struck:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    while rank == last and not store.check(["struck"]):
        time.sleep(0.01)
    try:
        with open_session(rank, rank_timeout=3.0) as session:
            session.exchange("values", b"")
    except KeyboardInterrupt:
        said = "interrupt"
        store.set("struck", b"")
    except SaveNotCommittedError as error:
        said = str(error)
    meet_all(rank)
    with open_session(rank) as session:
        values = session.exchange("values", b"%d" % rank)
    meet_all(rank)
    return said, values, leftovers()


@pytest.mark.parametrize(("struck", "last"), [(2, 3), (2, 0), (2, 1), (0, 3)])
def test_an_interrupt_while_ranks_meet(struck: int, last: int) -> None:
    """Catches a rank that was interrupted before all had come and is taken for lost, or for one that does not make the call."""
    for rank, (said, values, left) in enumerate(run_ranks(4, interrupted_in_the_meeting, struck, last)):
        assert said == ("interrupt" if rank == struck else f"rank {struck} was interrupted"), (rank, said)
        assert values == [b"0", b"1", b"2", b"3"] and left == []


def interrupted_while_answered(rank: int, answered: bool) -> tuple[str, float]:
    """Rank 1 is interrupted when rank 0 has seen that all have come: before it is answered, or before it is connected."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    meet_all(rank)
    answer = Rendezvous._answer

    def late(self: Rendezvous, *arguments: Any) -> Any:
        while self._line.has([self._key("arrived", 1)]):
            time.sleep(0.01)
        return answer(self, *arguments)

    connect = Member._connect

    def late_too(self: Member) -> None:
        if sys._getframe(1).f_code is Member.fail.__code__:  # not on its usual way
            connect(self)

    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with mock.patch.object(Member, "_connect", late_too) if answered and rank == 1 else nullcontext():
        with nullcontext() if answered else mock.patch.object(Rendezvous, "_answer", late):
            try:
                with open_session(rank) as session:
                    session.exchange("values", b"")
            except (KeyboardInterrupt, SaveNotCommittedError) as error:
                return str(error), time.monotonic() - began
    return "no error", 0.0


@pytest.mark.parametrize("answered", [False, True])
def test_an_interrupt_while_ranks_are_answered(answered: bool) -> None:
    """Catches a rank that waits at the end of the call for one that has already left it."""
    for rank, (said, seconds) in enumerate(run_ranks(4, interrupted_while_answered, answered)):
        assert said == ("" if rank == 1 else "rank 1 was interrupted") and seconds < 4, (rank, said, seconds)


def interrupted_at_the_exit(rank: int) -> str:
    interrupt = mock.patch.object(Session, "__exit__", side_effect=KeyboardInterrupt)
    options = {"rank_timeout": 20.0, "phase_timeout": 20.0}
    if rank == 1:
        interrupt.start()
    try:
        with session_of(dist.group.WORLD, "save", "ckpt", **options) as session:
            session.exchange("values", b"")
            if rank != 1:
                session.exchange("more", b"")
    except KeyboardInterrupt as error:  # its traceback keeps the session alive
        time.sleep(1)
        return f"{type(error).__name__} {[thread.name for thread in threading.enumerate() if 'ranks' in thread.name]}"
    except ShardSaveError as error:
        return str(error)
    return ""


def test_an_interrupt_at_the_end_of_the_context() -> None:
    """Catches a session that goes on giving signs of life when an interrupt has struck before its end could begin."""
    told = ["cannot save ckpt: rank 1 was interrupted"] * 4
    assert run_ranks(4, interrupted_at_the_exit) == [told[0], "KeyboardInterrupt []", *told[2:]]


def call_differently(rank: int) -> None:
    begin(dist.group.WORLD, "load_model" if rank == 3 else "save", "other" if rank == 1 else "ckpt")


def test_other_calls() -> None:
    """Catches ranks that meet in different calls."""
    with Job(4, call_differently) as job:
        ends = job.ended()
    told = (
        "cannot save ckpt: all ranks were expected to make the same call, "
        "found ranks 0, 2: save ckpt; rank 1: save other; rank 3: load_model ckpt; nothing was read or written"
    )
    assert {(end.error, end.message) for end in ends} == {("ValueError", told)}


def two_threads(rank: int) -> object:
    values: list[object] = []

    def aside() -> None:
        with begin(dist.group.WORLD, "save", "a", apart="background") as session:
            values.append(session.exchange("values", b"aside"))
            done.wait()

    done = threading.Event()
    thread = threading.Thread(target=aside)
    thread.start()
    with begin(dist.group.WORLD, "save", "a") as session:
        values.append(session.exchange("values", b"here"))
        with pytest.raises(ShardSaveError) as caught:
            begin(dist.group.WORLD, "load", "b")
        values.append(session.exchange("again", b""))
    done.set()
    thread.join()
    with begin(dist.group.WORLD, "load", "b") as session:
        values.append(session.exchange("values", b"then"))
    return sorted(map(str, values)), str(caught.value)


def test_two_sessions_at_once() -> None:
    """Catches sessions of two threads that take each other's values, and a second one in the same place that hangs."""
    for values, refused in run_ranks(3, two_threads):
        assert values == sorted(str([value] * 3) for value in (b"aside", b"here", b"", b"then"))
        assert refused == (
            "cannot load b: one collective call of a group at a time was expected, "
            "this process is in: save a on thread 'MainThread'; wait until that has ended"
        )
