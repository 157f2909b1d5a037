"""Measures time and memory of an operation, and asks the kernel what the page cache holds."""

from __future__ import annotations

import contextlib
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
    """Measures wall time, processor time and peak extra memory since its construction.

    Memory is the kernel's own peak (VmHWM, reset through /proc/self/clear_refs): the resident pages of the process. So the accessed
    pages of a mapped file count, but the page cache that read and write use does not.
    """

    def __init__(self) -> None:
        forget_peak()
        self._before = resident_bytes()
        self._disk = _disk_traffic()
        self._cpu = processor_seconds()
        self._wall = time.perf_counter()

    def read(self) -> dict[str, Any]:
        wall, cpu = time.perf_counter() - self._wall, processor_seconds() - self._cpu
        peak = peak_bytes() - self._before
        read, written = (after - before for after, before in zip(_disk_traffic(), self._disk))
        return {"wall": wall, "cpu": cpu, "peak_extra": peak, "read_from_disk": read, "written": written}


def touch_free_memory(nbytes: int) -> None:
    """Writes to ``nbytes`` of free memory, so that the host of a virtual machine provides it before the measurement.

    A host takes back memory that was free for a while. Without this call, the first use of such memory, by the process or the page
    cache, would include the time to get it back, and that time varies.
    """
    with mmap.mmap(-1, nbytes) as pages:
        for start in range(0, nbytes, resource.getpagesize()):
            pages[start] = 1


def processor_seconds() -> float:
    """User and system time of all threads of this process, without kernel threads that work for it (writeback)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def family_seconds() -> float:
    """`processor_seconds` of this process, its children and its ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for child in children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return processor_seconds() + used.ru_utime + used.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """The processes that threads of this process have started and that have not ended."""
    lists = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lists.append(file.read_text())
    return [int(child) for text in lists for child in text.split()]


def children_bytes() -> int:
    """The memory of all children that they share with no file and no other process."""
    total = 0
    for child in children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, RuntimeError):  # a zombie has no memory
            total += _status("RssAnon", child)
    return total


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most resident memory since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no {field}")


def _disk_traffic() -> tuple[int, int]:
    """The bytes that this process, and its children that have ended, have read from disks; and written, at once or to be written back."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def loopback_bytes() -> int:
    """The bytes that all processes of this machine have sent to one another through the network, with the headers of packets."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[0])
    raise RuntimeError("/proc/net/dev has no lo")


def files_below(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def cached_bytes(path: Path) -> tuple[int, int] | None:
    """Bytes of the files below ``path`` in the page cache, and how many of these are not on disk yet; None if unknown."""
    page = resource.getpagesize()
    cached = unwritten = 0
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            pages = _Pages()
            if _libc.syscall(_CACHESTAT, fd, ctypes.byref(_Range(0, 0)), ctypes.byref(pages), 0) != 0:
                return None
            cached += pages.cached * page
            unwritten += (pages.dirty + pages.writeback) * page
        finally:
            os.close(fd)
    return cached, unwritten


def sync_files(path: Path) -> None:
    """Calls fsync for every file and then for every directory, as a careful caller does after a save that does not sync."""
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
    """Removes the files below ``path`` from the page cache. Raises if that fails, since a cold measurement would be worthless."""
    sync_files(path)
    for attempt in range(10):
        for file in files_below(path):
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        cached = cached_bytes(path)
        if cached is None or cached[0] == 0:
            return
        if attempt and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("1")
        time.sleep(0.1)
    raise RuntimeError(f"{path}: {cached[0]} bytes stay in the page cache")


def make_warm(path: Path) -> None:
    """Reads the files below ``path`` into the page cache."""
    for file in files_below(path):
        with open(file, "rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def disk_bytes(path: Path) -> int:
    """The total length of the files below ``path`` in bytes."""
    return sum(file.stat().st_size for file in files_below(path))
