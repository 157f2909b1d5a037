"""What is measured around an operation, and the page cache seen from outside."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import time
from pathlib import Path
from typing import Any

_CACHESTAT = 451  # cachestat(2), the same number on every architecture


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Pages(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


_libc = ctypes.CDLL(None, use_errno=True)


class Meter:
    """Wall and processor seconds since it was made, and the most memory that the process had beyond what it had then.

    Memory is the kernel's own peak (VmHWM, set back through /proc/self/clear_refs): resident pages of the process, so a
    mapped file counts as far as it is mapped in, and the page cache behind read and write does not.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")
        self._read = _read_from_disk()
        self._cpu = processor_seconds()
        self._wall = time.perf_counter()

    def read(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter() - self._wall, processor_seconds() - self._cpu
        peak = _status("VmHWM") - self._before
        return {"wall": wall, "cpu": cpu, "peak_extra": peak, "read_from_disk": _read_from_disk() - self._read}


def touch_free_memory(nbytes: int) -> None:
    """Makes ``nbytes`` of free memory the machine's own: the host of a virtual one takes back what was free for a while.

    Without it the first to use new memory, of the process or of the page cache, pays for having it fetched, now more, now less.
    """
    with mmap.mmap(-1, nbytes) as pages:
        for start in range(0, nbytes, resource.getpagesize()):
            pages[start] = 1


def processor_seconds() -> float:
    """User and system time of all threads of this process. What kernel threads do on its behalf (writeback) is not in it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _read_from_disk() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def files_below(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def cached_bytes(path: Path) -> tuple[int, int] | None:
    """Bytes of the files below ``path`` in the page cache, and how many of those are not on disk yet; None where unknown."""
    page = resource.getpagesize()
    cached = unwritten = 0
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            found = _Pages()
            if _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, 0)), ctypes.byref(found), 0) != 0:
                return None
            cached += found.cached * page
            unwritten += (found.dirty + found.writeback) * page
        finally:
            os.close(fd)
    return cached, unwritten


def sync_files(path: Path) -> None:
    """What a careful caller adds to a save that does not do it: fsync of every file, then of every directory."""
    folders = {path, path.parent}
    for file in files_below(path):
        _fsync(file)
        folders.add(file.parent)
    for folder in folders:
        if folder.is_dir():
            _fsync(folder)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_cold(path: Path) -> None:
    """Takes the files below ``path`` out of the page cache, or raises: a cold figure that is not cold is worth nothing."""
    sync_files(path)
    for attempt in range(10):
        for file in files_below(path):
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        there = cached_bytes(path)
        if there is None or there[0] == 0:
            return
        if attempt and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        time.sleep(0.1)
    raise RuntimeError(f"{path}: {there[0]} bytes stay in the page cache")


def make_warm(path: Path) -> None:
    """Brings the files below ``path`` into the page cache."""
    for file in files_below(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def disk_bytes(path: Path) -> int:
    """Bytes of the files below ``path`` by their length."""
    return sum(file.stat().st_size for file in files_below(path))
