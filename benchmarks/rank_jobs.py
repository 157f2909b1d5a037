"""Runs a function in several processes of one job on this machine, each with the default group of torch.distributed made (gloo)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import measure

SECONDS = 300.0  # a job that takes longer has hung

#: What a rank does: calls its argument once when it is ready, which returns when all are; returns its figures.
Work = Callable[[Callable[[], None]], dict[str, Any]]


def run_job(size: int, work: Work) -> tuple[list[dict[str, Any]], int]:
    """What ``work`` returns on each of ``size`` ranks, and the bytes that they sent through the network after all were ready.

    Forks this process, which must have no threads. Raises RuntimeError if a rank fails.
    """
    context = multiprocessing.get_context("fork")
    pairs = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(target=_run_rank, args=(rank, size, work, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    pipes = [ours for ours, _ in pairs]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the forks, since it has threads
    try:
        for pipe in pipes:
            pipe.send(store.port)
        _received(pipes)
        loopback = measure.loopback_bytes()
        for pipe in pipes:
            pipe.send("all are ready")
        figures = _received(pipes)
        return figures, measure.loopback_bytes() - loopback
    finally:
        for process in processes:
            process.kill()


def _run_rank(rank: int, size: int, work: Work, pipe: Connection) -> None:
    def wait_for_all() -> None:
        pipe.send("ready")
        pipe.recv()

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        dist.barrier()  # connects all ranks
        figures = work(wait_for_all)
    except BaseException as error:
        figures = {"failed": f"rank {rank}: {type(error).__name__}: {error}"}
    pipe.send(figures)
    pipe.recv()
    sys.stdout.flush()
    os._exit(0)  # threads of torch's groups now and then abort a process that ends in the usual way


def _received(pipes: list[Connection]) -> list[Any]:
    """One message of each rank."""
    messages = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(SECONDS):
            raise RuntimeError(f"rank {rank} says nothing for {SECONDS:.0f} s")
        messages.append(pipe.recv())
    failed = [message["failed"] for message in messages if isinstance(message, dict) and "failed" in message]
    if failed:
        raise RuntimeError(failed[0])
    return messages
