"""Several hosts on this machine: network namespaces with a bridge between them, each with a name of its own. Only root can make them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

# of linux/sched.h and linux/mount.h
_NEW_MOUNTS, _NEW_NAMES, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x40000


class Network(NamedTuple):
    """``hosts`` hosts with two ranks each. ``folder``: where the files are that each has as its own."""

    name: str
    folder: Path

    def __call__(self, rank: int) -> str:
        """Moves this process, which has no threads, to the host of ``rank``. Returns the address of host 0."""
        host = rank // 2
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/var/run/netns/{self.name}-{host}", os.O_RDONLY)
        name = f"node{host}".encode()
        done = libc.setns(fd, _NEW_NETWORK) or libc.unshare(_NEW_NAMES | _NEW_MOUNTS) or libc.sethostname(name, len(name))
        done = done or libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None)
        binds = [(self.folder / "hosts", "/etc/hosts"), (self.folder / "resolv.conf", "/etc/resolv.conf")]
        if (own := self.folder / f"own-{host}").is_dir():
            binds.append((own, str(self.folder / "disk")))
        for source, target in binds:
            done = done or libc.mount(os.fsencode(source), os.fsencode(target), None, _BIND, None)
        if done:
            raise OSError(ctypes.get_errno(), "cannot move to a host of its own")
        os.close(fd)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        return _address(0)


@contextmanager
def network(folder: Path, hosts: int) -> Iterator[Network]:
    """A network of ``hosts`` hosts that share ``folder / "disk"``. Skips the test where this is not allowed."""
    made = Network(f"shardsave-{os.getpid()}", folder)
    (folder / "disk").mkdir()
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{_address(host)} node{host}\n" for host in range(hosts)))
    (folder / "resolv.conf").write_text("")
    names = [f"{made.name}-{host}" for host in range(hosts)]
    lines = [f"netns add {made.name}", f"-n {made.name} link add bridge0 type bridge", f"-n {made.name} link set bridge0 up"]
    for host, name in enumerate(names):
        lines += [
            f"netns add {name}",
            f"-n {name} link set lo up",
            f"-n {made.name} link add port{host} type veth peer name eth0 netns {name}",
            f"-n {made.name} link set port{host} master bridge0 up",
            f"-n {name} addr add {_address(host)}/24 dev eth0",
            f"-n {name} link set eth0 up",
        ]
    try:
        for line in lines:
            _ip(line)
    except (OSError, subprocess.CalledProcessError) as error:
        _remove([made.name, *names])
        pytest.skip(f"networks cannot be made here: {getattr(error, 'stderr', '') or error}")
    try:
        yield made
    finally:
        _remove([made.name, *names])


def set_link(state: str) -> None:
    """On a host of a network: connects it (``state`` "up") or cuts it off ("down")."""
    _ip(f"link set eth0 {state}")


def _address(host: int) -> str:
    return f"10.77.7.{host + 1}"


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
