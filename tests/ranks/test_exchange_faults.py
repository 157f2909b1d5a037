"""What ranks see while they exchange and one of them fails, dies or stops: the same error, soon, and nothing of the exchange stays.

Method: four ranks ship a model; each owner takes its windows slowly; one rank fails after some of them. Ranks are on one host, or on four.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_save_exchange import columns, planned

from jobs import Job, run_ranks
from shardsave._common.assembled import Chunk
from shardsave._ranks import open_session as sessions
from shardsave._ranks.save_exchange import SaveExchange
from shardsave.errors import ShardSaveError

HOSTS = {"one host": (0, 0, 0, 0), "four hosts": (0, 1, 2, 3)}


class Refusing(torch.Tensor):
    """A tensor of which nothing can be copied; its class keeps it from being read in another way."""

    @classmethod
    def __torch_function__(cls, function: object, types: object, args: object = (), kwargs: object = None) -> object:
        if getattr(function, "__name__", "") == "copy_":
            raise RuntimeError("out of luck")
        return super().__torch_function__(function, types, args, kwargs or {})


def left_open() -> tuple[int, int]:
    """The descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


#: What was open before and after each exchange of this process, while its error was in flight.
LEFT: list[tuple[tuple[int, int], tuple[int, int]]] = []


def ship_slowly(rank: int, hosts: tuple[int, ...], fails: str, timeout: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """``fails``: what rank 2 does after two of its windows."""
    sessions.begin(dist.group.WORLD, "save", "here").close()  # what a process keeps for later sessions
    before = left_open()
    tensors = {f"w{n}": (torch.tensor([[float(n)]]).expand(2048, 2048), columns((2048, 2048), 4)) for n in range(12)}
    try:
        with sessions.begin(dist.group.WORLD, "save", "here", rank_timeout=timeout) as session:
            session.hosts = hosts
            shards = planned(tensors, rank, 50_000_000)
            if fails == "copy" and rank == 2:
                for shard in shards:
                    for piece in shard.pieces:
                        piece.local = tuple(Chunk(begin, held.as_subclass(Refusing)) for begin, held in piece.local)
            shipping = SaveExchange(session, shards, [0, 1, 2, 3])
            with closing(shipping.exchange) as exchange:
                exchange.start()
                windows = shipping.windows(shipping.own)
                for count, block in enumerate(np.flatnonzero(windows.of_block).tolist()):
                    while windows.take(block) is None:
                        session.check()
                    time.sleep(0.05)
                    if rank == 2 and count == 1:
                        if fails == "raise":
                            raise ValueError("no more")
                        if fails in ("kill", "stop"):
                            os.kill(os.getpid(), signal.SIGKILL if fails == "kill" else signal.SIGSTOP)
                    windows.give_back(block)
                exchange.finish()
            session.exchange("votes", b"")
    finally:
        deadline = time.monotonic() + 5
        while any(now > then for now, then in zip(left_open(), before)) and time.monotonic() < deadline:
            time.sleep(0.05)
        LEFT.append((before, left_open()))
    return LEFT[-1]


def lose(rank: int, hosts: tuple[int, ...], fails: str, timeout: float) -> tuple[str, tuple[int, int], tuple[int, int]]:
    """The error of `ship_slowly`, and what was open before and after it."""
    try:
        ship_slowly(rank, hosts, fails, timeout)
    except ShardSaveError as error:
        return str(error), *LEFT[-1]
    raise AssertionError


@pytest.mark.parametrize("hosts", [*HOSTS])
def test_nothing_stays(hosts: str) -> None:
    """Catches a thread, a descriptor or a socket that an exchange leaves."""
    for before, after in run_ranks(4, ship_slowly, HOSTS[hosts], "", 60.0):
        assert before == after


@pytest.mark.parametrize("hosts", [*HOSTS])
@pytest.mark.parametrize(("fails", "message"), [("raise", "rank 2: no more"), ("copy", "rank 2: .*out of luck")])
def test_an_error_on_one_rank(hosts: str, fails: str, message: str) -> None:
    """Catches ranks that wait for one that has failed, or call it lost."""
    started = time.monotonic()
    with Job(4, ship_slowly, HOSTS[hosts], fails, 60.0) as job:
        ends = job.ended()
    for rank, end in enumerate(ends):
        own = rank == 2 and end.error == "RuntimeError" and end.message in message
        assert own or (end.error and re.search(message, end.message)), ends
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("hosts", [*HOSTS])
@pytest.mark.parametrize(("fails", "timeout"), [("kill", 60.0), pytest.param("stop", 4.0, marks=pytest.mark.slow)])
def test_a_lost_rank(hosts: str, fails: str, timeout: float) -> None:
    """Catches ranks that wait for a dead one longer than for the end of its connection, or for a stopped one longer than they may; and
    connections to the others that stay open as long as somebody holds the error."""
    started = time.monotonic()
    with Job(4, lose, HOSTS[hosts], fails, timeout) as job:
        ends = job.ended(40, ranks=[0, 1, 3])
        seconds = time.monotonic() - started
    for end in ends:
        assert end.error is None, end
        message, before, after = end.value
        assert "rank 2 was lost" in message, message
        assert (after[0] <= before[0] and after[1] == before[1]) or fails == "stop", (before, after)  # that of rank 2 is closed
    assert seconds < 30
