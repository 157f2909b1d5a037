"""What is used of torch.distributed: the ranks of a process group, and the store of the job.

What is not public there is used in this file alone.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Store(Protocol):
    """What is used of a store. Values are bytes."""

    def clone(self) -> Store: ...
    def set(self, key: str, value: bytes, /) -> None: ...
    def compare_set(self, key: str, expected: bytes, value: bytes, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_set(self, keys: list[str], values: list[bytes], /) -> None: ...
    def add(self, key: str, number: int, /) -> int: ...
    def delete_key(self, key: str, /) -> bool: ...


class Members(NamedTuple):
    """The ranks of a process group: this process is number ``rank`` of ``names``, their global ranks. All ranks have the same ``key``."""

    rank: int
    names: tuple[int, ...]
    key: str


class Host(NamedTuple):
    """``key`` is the same for processes that find each other's sockets and may share memory."""

    key: str
    name: str


def members_of(group: ProcessGroup) -> Members:
    """The ranks of ``group``. Raises ValueError if this process is not one of them."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"process_group must be a group that this process belongs to, rank {dist.get_rank()} does not")
    names = tuple(dist.get_process_group_ranks(group))
    key = hashlib.sha256(f"{group.group_name} {names}".encode()).hexdigest()[:16]
    return Members(rank, names, key)


def job_store() -> Store:
    """The store by which the processes of the job have found each other. Raises RuntimeError."""
    try:
        from torch.distributed.distributed_c10d import _get_default_store

    except ImportError as error:
        raise RuntimeError(
            f"cannot reach the store of torch.distributed: `_get_default_store` was expected in torch, {torch.__version__} has none"
        ) from error
    return cast(Store, _get_default_store())


def is_refused(store: Store) -> bool:
    """Whether nobody serves ``store`` any more: its port refuses connections. False if that cannot be known."""
    while (inner := getattr(store, "underlying_store", None)) is not None:
        store = inner
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if host is None or port is None:
        return False
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def this_host() -> Host:
    """The machine, its running kernel, the network namespace and the user of this process.

    Copies of a virtual machine that were made while it ran have one boot id, so its name counts too. Users of two containers may have one
    number and be different ones for the kernel, which then does not let them share memory.
    """
    machine = socket.gethostname()
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read()
        network = os.stat("/proc/self/ns/net").st_ino
    except OSError:  # no /proc: this process is taken for a host of its own
        boot, network = os.urandom(8).hex(), 0
    name = "".join(c if c.isalnum() or c in "-._" else "?" for c in machine)
    return Host(hashlib.sha256(f"{boot} {machine} {network} {_user_outside()}".encode()).hexdigest()[:16], name[:64] or "?")


def _user_outside() -> int:
    """The number that the user of this process has outside of its user namespace, by the map of user_namespaces(7)."""
    user = os.geteuid()
    with suppress(OSError):  # a kernel without user namespaces
        with open("/proc/self/uid_map") as file:
            for inside, outside, length in (map(int, line.split()) for line in file):
                if inside <= user < inside + length:
                    return outside + user - inside
    return user
