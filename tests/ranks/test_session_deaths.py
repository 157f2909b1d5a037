"""Sessions in which a rank is killed, stopped, interrupted or forked, or the store is lost: all others learn of it."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_session import leftovers, meet_all, open_session

from jobs import Job, run_ranks
from shardsave.errors import SaveNotCommittedError
from warm_python import warm_python

#: Seconds without a sign of life in these tests.
SILENCE = 2.5


def wait_for_death(rank: int, hosts: int, struck: int, where: str) -> None:
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    with open_session(rank, hosts, rank_timeout=SILENCE) as session:
        session.exchange("values", b"")
        if rank == struck:
            os.kill(os.getpid(), signals[where])
        session.exchange("more", b"")


SILENT = f"a sign of life was expected within rank_timeout={SILENCE:g} s, there was none"
STORE_LOST = "the store of torch.distributed does not answer: rank 0 or the agent that serves it was lost"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_is_lost(how: str) -> None:
    """Catches ranks that wait for a dead or a stopped one, or that do not say which it was. Each rank is lost, in a job of its own."""
    cases = [(hosts, struck) for hosts in (1, 2, 4) for struck in range(4)]
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(4, wait_for_death, *case, how)) for case in cases]
        ends = [
            job.ended(ranks=[rank for rank in range(4) if rank != struck]) for (_, struck), job in zip(cases, jobs, strict=True)
        ]
    for (hosts, struck), those in zip(cases, ends, strict=True):
        reason = "its process has ended" if how == "kill" and hosts < 4 else SILENT
        name = f"rank {struck}" + (f" (machine{struck * hosts // 4})" if hosts > 1 else "")
        assert {(end.error, end.message) for end in those} == {("SaveNotCommittedError", f"{name} was lost: {reason}")}, those


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_rank_0_is_lost_with_the_store(how: str) -> None:
    """Catches ranks that wait for ever for an answer of the store, which a stopped process does not give."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(4, wait_for_death, hosts, 0, how, store_in="rank 0")) for hosts in (1, 2, 4)]
        ends = [job.ended(seconds=40, ranks=[1, 2, 3]) for job in jobs]
    assert [{(end.error, end.message) for end in those} for those in ends] == [{("StoreLost", STORE_LOST)}] * 3


def lose_store(rank: int, hosts: int, folder: Path) -> str:
    with open_session(rank, hosts, rank_timeout=SILENCE) as session:
        session.exchange("values", b"")
        (folder / str(rank)).touch()
        while True:
            session.check()
            time.sleep(0.01)


def test_the_agent_is_lost(tmp_path: Path) -> None:
    """Catches ranks of several hosts that go on without a store, in which no error could be told."""
    with Job(4, lose_store, 2, tmp_path) as job:
        while len(list(tmp_path.iterdir())) < 4:
            time.sleep(0.01)
        job._store = None
        gc.collect()
        ends = job.ended(seconds=20)
    assert {(end.error, end.message) for end in ends} == {("StoreLost", STORE_LOST)}


def wake_up(rank: int, hosts: int, folder: Path) -> object:
    with pytest.raises(SaveNotCommittedError) as caught, open_session(rank, hosts, rank_timeout=SILENCE) as session:
        session.exchange("values", b"")
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        session.exchange("more", b"")
    (folder / f"{hosts} {rank}").touch()
    meet_all(rank)
    with open_session(rank, hosts, rank_timeout=SILENCE) as session:
        values = session.exchange("values", b"%d" % rank)
    meet_all(rank)
    return str(caught.value), values, leftovers()


def test_a_rank_that_wakes_up(tmp_path: Path) -> None:
    """Catches a rank that was stopped, and that takes the others for lost, hangs, or leaves keys, when it wakes up."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(4, wake_up, hosts, tmp_path)) for hosts in (1, 2)]
        while len(list(tmp_path.iterdir())) < 6:  # all others have taken it for lost
            time.sleep(0.01)
        for job in jobs:
            job.kill(2, signal.SIGCONT)
        ends = [job.ended(seconds=30) for job in jobs]
    for name, those in zip(("rank 2", "rank 2 (machine1)"), ends, strict=True):
        told = f"{name} was lost: {SILENT}"
        assert [end.value for end in those] == [(told, [b"0", b"1", b"2", b"3"], [])] * 4, those


def fork_in_session(rank: int) -> object:
    with open_session(rank) as session:
        session.exchange("values", b"")
        child = os.fork()
        if child == 0:
            try:
                session.check()
            except RuntimeError:
                session.close()
                time.sleep(0.5)
                os._exit(3 if not [key for key in os.listdir("/proc/self/fd") if is_abstract(key)] else 4)
            os._exit(5)
        values = session.exchange("more", b"%d" % rank)
    return values, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_abstract(fd: str) -> bool:
    """Whether a descriptor is a connection of a session."""
    try:
        with socket.socket(fileno=os.dup(int(fd))) as connection:
            return connection.family == socket.AF_UNIX and b"shardsave" in bytes(
                connection.getsockname() or connection.getpeername()
            )
    except (OSError, TypeError):
        return False


def test_a_fork() -> None:
    """Catches a child that takes part in the call of its parent, or keeps its connections open, so that its death goes unnoticed."""
    assert run_ranks(2, fork_in_session) == [([b"0", b"1"], 3)] * 2


def be_struck(rank: int, hosts: int, struck: int, seconds: float, number: signal.Signals) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open_session(rank, hosts).close()  # all ranks have come so far
    if rank == struck:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    try:
        while True:
            with open_session(rank, hosts, rank_timeout=SILENCE) as session:
                session.exchange("values", b"a" * 5000)
                session.gather("values", b"a" * 5000)
                session.publish("decision", b"a" if session.leads else None)
    except KeyboardInterrupt:
        end = time.monotonic() + 20
        while [thread for thread in threading.enumerate() if thread.name == "shardsave-ranks"]:
            if time.monotonic() > end:
                raise RuntimeError("the thread lives on") from None
            time.sleep(0.01)
        raise


def check_strokes(seed: int, count: int) -> None:
    """Strikes one rank of each of ``count`` jobs at a random moment. A job whose rank 0 is killed loses the store too."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        jobs = []
        for number in range(count):
            stroke = chance.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGINT])
            case = (chance.choice([1, 2, 4]), number % 4, 0.1 + chance.random() * 0.3, stroke)
            served_by = "rank 0" if case[1] == 0 and stroke == signal.SIGKILL else "agent"
            jobs.append((case, stack.enter_context(Job(4, be_struck, *case, store_in=served_by))))
        for case, job in jobs:
            _, struck, _, stroke = case
            ends = job.ended(seconds=60, ranks=[rank for rank in range(4) if rank != struck or stroke == signal.SIGINT])
            if stroke == signal.SIGINT:
                assert ends.pop(struck).error == "KeyboardInterrupt", (case, ends)
            told = [(end.error, end.message) for end in ends]
            assert {end.error for end in ends} <= {"SaveNotCommittedError", "StoreLost"}, (case, told)
            assert all(re.search(rf"ranks? [\d, to]*\b{struck}\b", end.message) for end in ends), (case, told)


def test_strokes() -> None:
    """Catches a moment, in a meeting too, at which a death or an interrupt of one rank makes others hang."""
    check_strokes(1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 2 + int(os.environ.get("SHARDSAVE_STROKES", "6"))))
def test_many_strokes(seed: int) -> None:
    """Catches what `test_strokes` catches, at more moments."""
    check_strokes(seed, 4)


SERVER = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""

FIRST_CALL = """
import os, signal, sys
import torch.distributed as dist
from shardsave._ranks import group as groups
from shardsave._ranks.arrivals import Call
from shardsave._ranks.open_session import begin_with
from shardsave._ranks.participant import Timeouts
store = dist.PrefixStore("job", dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, wait_for_workers=False))
os.kill(int(sys.argv[2]), signal.SIGKILL)
begin_with(store, groups.Members(1, (0, 1), "key"), groups.Host("host", "machine"), Call("save to", "ckpt"), Timeouts(240.0, 600.0))
"""


def test_a_store_that_dies_before_the_first_call() -> None:
    """Catches a rank that tries for as long as the timeout of torch's store to reach rank 0, which is dead, and a process whose end waits
    for that."""
    python = warm_python("torch.distributed", "shardsave._ranks.open_session")
    server = python.start(["-c", SERVER])
    while not server.out.endswith("\n"):
        time.sleep(0.01)
    began = time.monotonic()
    done = python.run(["-c", FIRST_CALL, server.out.strip(), server.pid])
    assert done.returncode == 1 and done.stderr.strip().endswith(f"StoreLost: {STORE_LOST}"), done.stderr
    assert time.monotonic() - began < 60.0 and server.wait() == -signal.SIGKILL
