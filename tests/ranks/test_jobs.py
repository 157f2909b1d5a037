"""The jobs of several processes that tests run."""

from __future__ import annotations

import signal
import time

import torch
import torch.distributed as dist

from jobs import Job, run_ranks


def total(rank: int) -> float:
    value = torch.tensor([float(rank)])
    dist.all_reduce(value)
    return value.item()


def fail_or_sleep(rank: int) -> None:
    if rank == 0:
        raise ValueError("no")
    time.sleep(600)


def test_a_job() -> None:
    """Catches ranks that do not meet, and results that come back in another order."""
    assert run_ranks(4, total) == [6.0] * 4


def test_ends_of_ranks() -> None:
    """Catches an error or a death that a test would not see."""
    with Job(2, fail_or_sleep) as job:
        (first,) = job.ended(ranks=[0])
        job.kill(1, signal.SIGKILL)
        (second,) = job.ended(ranks=[1])
    assert (first.error, first.message) == ("ValueError", "no") and second.exit_code == -signal.SIGKILL
