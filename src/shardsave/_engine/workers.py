"""How many threads the C++ engine uses."""

from __future__ import annotations

import os

from shardsave._engine.transfer import Access, Request
from shardsave._native import DEVICE_SLOTS, SLOTS


def worker_count(access: Access, *, with_device: bool) -> int:
    """Two workers for each processor, so that one copies while the other waits for the disk; at most one for each slot of the ring.

    If ``access`` is "buffered" no worker waits for the disk: one for each processor is enough. With a device most workers wait for a
    copy: one for each slot. More workers than are useful would cost time, since each one touches the memory of another slot first.
    """
    if with_device:
        return DEVICE_SLOTS
    processors = len(os.sched_getaffinity(0))
    return max(1, min(SLOTS, processors if access == "buffered" else 2 * processors))


def copiers_and_workers(request: Request, *, with_device: bool) -> tuple[int, int]:
    """How many threads of a run copy at one time (0: all), and how many there are.

    Those beyond the ones that copy wait for the disk, so the memory of the pieces is read ahead of it by as much as the ring holds: a
    step of a training waits for the memory, not for the disk.
    """
    useful = worker_count(request.access, with_device=with_device)
    if request.workers is None:
        return 0, useful
    copiers = min(request.workers, useful)
    if request.windows is not None or request.access != "direct":
        return copiers, copiers
    return copiers, DEVICE_SLOTS if with_device else SLOTS
