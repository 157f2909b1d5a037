"""Runs a function in several processes of one job, over gloo: each is forked from a server that has imported torch.

A test passes a function at the top level of its module. It is called as ``function(rank, *arguments)`` in each process, with the default
group of torch.distributed made; what it returns must be picklable.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

# Each connection to a store looks up the names of both ends. An answer that is lost delays all ranks by five seconds, else.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

#: For so many seconds a job may run, unless a test says otherwise; a busy machine makes everything many times slower.
SECONDS = 120.0

_CONTEXT = multiprocessing.get_context("forkserver")

#: Whether ranks begin with transformers and PEFT imported → the server from which they are forked, started by the first job.
_SERVERS = {libraries: forkserver.ForkServer() for libraries in (False, True)}
_SERVERS[False].set_forkserver_preload(["jobs_preload", "pytest"])
_SERVERS[True].set_forkserver_preload(["jobs_preload", "pytest", "jobs_preload_libraries"])


class Ended(NamedTuple):
    """How one rank ended: with a ``value``, with an error (the name of its class, its message), or without a word."""

    value: Any = None
    error: str | None = None
    message: str = ""
    exit_code: int | None = None
    trace: str = ""


def on_this_host(rank: int) -> str:
    """Every rank runs where the test does."""
    return "127.0.0.1"


class Job:
    """A job of ``size`` processes that run ``function``. Ends them all when it is left.

    ``store_in``: who serves the store of the job: this process, as an agent of torchrun does, or ``"rank 0"``, so that it dies with it.
    ``libraries``: whether each rank begins with transformers and PEFT imported, which takes seconds. ``place``: called first in each
    process, with its rank; returns the address at which it finds the store.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., Any],
        *arguments: Any,
        store_in: str = "agent",
        libraries: bool = False,
        place: Callable[[int], str] = on_this_host,
    ) -> None:
        self.size = size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store_in == "agent" else None
        port = self._store.port if self._store is not None else None
        server = _SERVERS[libraries]
        with mock.patch.dict(
            os.environ, PYTHONPATH=os.pathsep.join(sys.path)
        ):  # the server does not get our path in another way
            server.ensure_running()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(
                target=_run_rank,
                args=(rank, size, place, port, theirs, list(sys.path), function, arguments),
            )
            with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
            if port is None:  # this is rank 0: nobody else can take the port that it has found free
                port = ours.recv()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to ``rank``."""
        os.kill(self.processes[rank].pid or 0, number)

    def ended(self, seconds: float = SECONDS, ranks: Sequence[int] | None = None) -> list[Ended]:
        """How ``ranks`` (all, by default) ended, in order. Raises AssertionError if one of them has not within ``seconds``."""
        ranks = range(self.size) if ranks is None else ranks
        ends: dict[int, Ended] = {}
        deadline = time.monotonic() + seconds
        while waiting := [rank for rank in ranks if rank not in ends]:
            ready = wait([self._pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {waiting} have not ended within {seconds:.0f} s; ended: {ends}"
            for rank in waiting:
                if self._pipes[rank] in ready:
                    ends[rank] = self._receive(rank)
        for pipe in self._pipes:  # nobody leaves before all have ended: that would break connections of the others
            with contextlib.suppress(OSError):
                pipe.send(None)
        return [ends[rank] for rank in ranks]

    def _receive(self, rank: int) -> Ended:
        try:
            return Ended(*self._pipes[rank].recv())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join()
            return Ended(exit_code=self.processes[rank].exitcode)


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS, libraries: bool = False
) -> list[Any]:
    """What ``function`` returned on each rank. Raises AssertionError with the traces if it raised on one of them."""
    with Job(size, function, *arguments, libraries=libraries) as job:
        ends = job.ended(seconds)
    failed = [f"rank {rank}: {end.trace or end}" for rank, end in enumerate(ends) if end.error or end.exit_code is not None]
    assert not failed, "\n".join(failed)
    return [end.value for end in ends]


def _run_rank(
    rank: int,
    size: int,
    place: Callable[[int], str],
    port: int | None,
    pipe: Connection,
    path: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        store = dist.TCPStore(place(rank), port or 0, is_master=port is None, wait_for_workers=False)
        if port is None:
            pipe.send(store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        end = Ended(function(rank, *arguments))
    except BaseException as error:
        end = Ended(error=type(error).__name__, message=str(error), trace=traceback.format_exc())
    try:
        pipe.send(tuple(end))
        pipe.recv()
    except (EOFError, OSError):
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch's groups now and then abort a process that ends in the usual way
