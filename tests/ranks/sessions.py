"""Sessions for tests of single steps: over threads of one process, or over the default group of torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class ThreadSession:
    """The session of one of several threads; ``shared`` is that of all of them. ``sent``: the bytes that this rank gave away."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank = rank
        self.size = shared.size
        self.hosts = [0] * shared.size
        self.sent = 0
        self._shared = shared

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def exchange(self, what: str, mine: bytes) -> list[bytes]:
        self.sent += len(mine)
        self._shared.values[self.rank] = mine
        self._shared.barrier.wait()
        values = list(self._shared.values)
        self._shared.barrier.wait()
        return values

    def gather(self, what: str, mine: bytes) -> list[bytes] | None:
        values = self.exchange(what, mine)
        return values if self.rank == 0 else None

    def publish(self, what: str, value: bytes | None = None) -> bytes:
        assert (value is not None) == (self.rank == 0)
        return self.exchange(what, value or b"")[0]


class Shared:
    def __init__(self, size: int) -> None:
        self.size = size
        self.values = [b""] * size
        self.barrier = threading.Barrier(size, timeout=60)


def on_threads(size: int, function: Callable[..., Any]) -> list[Any]:
    """What ``function(session)`` returned or raised on each of ``size`` threads."""
    shared = Shared(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadSession(rank, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class GroupSession(ThreadSession):
    """The session of this process, over the default group of torch.distributed."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.hosts = [0] * self.size
        self.sent = 0

    def exchange(self, what: str, mine: bytes) -> list[bytes]:
        self.sent += len(mine)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, mine)
        return values
