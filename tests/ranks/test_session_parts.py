"""The parts of a session that need no other process."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from itertools import pairwise
from pathlib import Path

import pytest

from shardsave._ranks import heartbeat
from shardsave._ranks.failures import Failure, failure_of, unpacked
from shardsave._ranks.group import this_host
from shardsave._ranks.heartbeat import Pulse
from shardsave._ranks.sockets import Message, Peer, connect
from shardsave._ranks.topology import Topology, listed, unpack_topology
from shardsave._ranks.values import pack, unpack
from shardsave.errors import SaveNotCommittedError


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that takes others for lost too soon or never, or because it was stopped itself."""
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    pulse = Pulse(8.0, (1, 2))
    heard = []
    for second in range(12):
        clock.now += 1.0
        if second < 9:
            pulse.hear(1)
        heard.append(pulse.silent())
    assert heard == [[]] * 8 + [[2]] * 4
    clock.now += 1000.0
    assert pulse.silent() == [2]
    pulse.forget(2)
    assert pulse.silent() == []


def test_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches signs of life that are given too seldom for the timeout, or at every look."""
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    for timeout, seconds in ((2.0, 0.25), (120.0, 10.0)):
        pulse = Pulse(timeout)
        times = [clock.now for _ in range(1000) if not setattr(clock, "now", clock.now + timeout / 100) and pulse.due()]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert seconds - timeout / 100 <= min(gaps) and max(gaps) <= seconds + timeout / 100


@pytest.mark.parametrize(
    "values", [[b""], [b"a", b"b", b"a"], [b"x" * 100_000] * 1000, [b"%d" % number for number in range(3000)]]
)
def test_values(values: list[bytes]) -> None:
    """Catches values that are lost or come in another order; equal ones of many ranks must take the room of one."""
    assert unpack(pack(values)) == values
    assert len(pack(values)) < 20_000


def test_lists_of_ranks() -> None:
    """Catches ranks that are not named, and messages of many pages."""
    assert listed([3]) == "rank 3"
    assert listed([2, 0, 1, 5, 6, 9]) == "ranks 0 to 2, 5, 6, 9"
    assert listed(range(0, 10_000, 2)).endswith("36, 38, …")


def test_the_roll() -> None:
    """Catches machines that are mixed up, and a roll of 10,000 ranks that is too long to send."""
    roll = Topology(
        tuple(rank // 8 for rank in range(10_000)), tuple(f"node-{host}" for host in range(1250)), tuple(range(10_000))
    )
    assert unpack_topology(roll.packed(), roll.names) == roll and len(roll.packed()) < 40_000
    assert roll.name(17) == "rank 17 (node-2)" and roll.leaders()[:3] == [0, 8, 16] and roll.ranks_of(1) == [*range(8, 16)]


def test_time_for_the_ranks_of_all_hosts() -> None:
    """Catches a look at all of 10,000 ranks for each of their hosts, which rank 0 asks for whenever it gathers."""
    roll = Topology(
        tuple(rank // 8 for rank in range(10_000)), tuple(f"node-{host}" for host in range(1250)), tuple(range(10_000))
    )
    started = time.process_time()
    assert sum(len(roll.ranks_of(host)) for _ in range(10) for host in range(1250)) == 100_000
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (SaveNotCommittedError("a\nb"), "SaveNotCommittedError", "rank 1: a\\nb"),
        (FileNotFoundError("a"), "", "rank 1: FileNotFoundError: a"),
        (KeyboardInterrupt(), "", "rank 1 was interrupted"),
        (MemoryError("x" * 100_000), "MemoryError", "rank 1: " + "x" * 31_992),
    ],
)
def test_failures(error: BaseException, kind: str, text: str) -> None:
    """Catches an error whose class or text changes on its way to another rank."""
    failure = unpacked(failure_of(error, "rank 1").packed())
    assert failure == Failure(kind, text)
    assert type(failure.error(SaveNotCommittedError)).__name__ == kind or kind == ""


def host_key(namespace: bool, name: str = "") -> str:
    """The key of the host of a child, whose user namespace has other users for the kernel, if ``namespace``; ``name``: of its machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    ours, theirs = os.pipe()
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        failed = libc.unshare(0x10000000) if namespace else 0  # CLONE_NEWUSER
        failed = failed or (libc.unshare(0x04000000) or libc.sethostname(name.encode(), len(name)) if name else 0)
        os.write(theirs, b"-" if failed else b"+")
        os.read(ready, 1)
        os.write(theirs, b"" if failed else this_host().key.encode())
        os._exit(0)
    os.close(theirs)
    failed = os.read(ours, 1) == b"-"
    if namespace and not failed:
        Path(f"/proc/{child}/uid_map").write_text("0 100000 1000")
    os.write(go, b"x")
    key = os.read(ours, 100).decode()
    os.waitpid(child, 0)
    for fd in (ours, ready, go):
        os.close(fd)
    if failed:
        pytest.skip("namespaces are not allowed here")
    return key


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may map other users")
def test_what_a_host_is() -> None:
    """Catches processes that are taken for ranks of one host and cannot share memory: users of two containers that have the same number,
    and copies of a virtual machine, whose kernels have the same boot id."""
    own = this_host().key
    assert host_key(namespace=False) == own
    assert own not in (host_key(namespace=True), host_key(namespace=False, name="other"))


def test_a_leader_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that tries again and again where the system refuses the connection for good."""

    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            raise PermissionError(1, "Operation not permitted")

    assert connect(f"shardsave/nobody/{os.getpid()}") is None
    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(PermissionError):
        connect("shardsave/somebody")


def test_messages() -> None:
    """Catches messages that are cut where the connection takes no more, and an end that hides what was sent before it."""
    here, there = (Peer(end) for end in socket.socketpair(socket.AF_UNIX))
    sent = [Message(1, number, bytes([number]) * (number * 100_000)) for number in range(20)]
    for message in sent:
        here.send(message)
    assert not here.flushed
    received = []
    while not here.flushed:
        received += there.receive()
        here.flush()
    here.close()
    while not there.ended:
        received += there.receive()
    there.close()
    assert received == sent
