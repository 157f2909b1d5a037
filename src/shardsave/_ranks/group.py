"""What is used of torch.distributed: the store of the job, and the ranks of a process group."""

from __future__ import annotations

import hashlib
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store


class Members(NamedTuple):
    """The ranks of a process group. ``rank`` is the position of this process in ``names``, which are global ranks."""

    rank: int
    names: tuple[int, ...]
    key: str


def members(group: ProcessGroup) -> Members:
    names = tuple(dist.get_process_group_ranks(group))
    text = f"{group.group_name} {names}"
    return Members(dist.get_group_rank(group, dist.get_rank()), names, hashlib.sha256(text.encode()).hexdigest()[:16])


def job_store() -> Store:
    """A connection of its own to the store of the job. Raises RuntimeError."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        clone = store.clone
    except (ImportError, AttributeError, ValueError) as error:
        raise RuntimeError(f"the store of torch.distributed was expected to be reachable in torch {dist.__name__}") from error
    return clone()


def host() -> str:
    """Names what processes must have in common to share memory: the running kernel, and the network in which they find each other."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino} {os.geteuid()}"


def host_name() -> str:
    return socket.gethostname()
