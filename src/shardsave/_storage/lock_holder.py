"""Who holds a lock of flock(2): /proc/locks lists the process that took each one, by device and inode (proc(5))."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from shardsave._common.imports import import_at_use

#: ``1: FLOCK  ADVISORY  WRITE 4321 08:02:1234567 0 EOF``; the device in hex, the inode not. Those who wait have an arrow after the number.
_LOCK = re.compile(r"\d+: FLOCK +\w+ +\w+ (-?\d+) ([0-9a-f]+:[0-9a-f]+:\d+) ")


def lock_holder(fd: int, *, proc: str = "/proc") -> str:
    """Words about the process that holds a lock on the open file ``fd``: ``"process 4321, python"``; "" if that is not certain.

    A process of another namespace of process numbers, or on another host, is not listed. Some file systems (Btrfs, overlays) have another
    device here than in stat(2).
    """
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open(os.path.join(proc, "locks"), encoding="ascii", errors="replace") as file:
            matches = [match for match in map(_LOCK.match, file) if match is not None]
    except OSError:
        return ""
    pids = {int(match[1]) for match in matches if match[2] == wanted and int(match[1]) > 0}
    pids = {pid for pid in pids if _has_open(pid, status, proc)}
    if len(pids) != 1:
        return ""
    (pid,) = pids
    return "this process" if pid == os.getpid() else f"process {pid}{_name(pid)}"


def _has_open(pid: int, status: os.stat_result, proc: str) -> bool:
    """Whether process ``pid`` has the file open. Its number alone proves nothing: a lock outlives the process that took it in a child."""
    folder = os.path.join(proc, str(pid), "fd")
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    for name in names:
        with suppress(OSError):
            if os.path.samestat(os.stat(os.path.join(folder, name)), status):
                return True
    return False


def _name(pid: int) -> str:
    import_at_use("psutil")  # only for this message
    import psutil

    try:
        return f", {psutil.Process(pid).name()}"
    except (psutil.Error, OSError):
        return ""
