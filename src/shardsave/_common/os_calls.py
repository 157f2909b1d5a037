"""Calls to the operating system that name themselves and their file when they fail.

Open files are in `shardsave._common.descriptors`, calls on the names in a directory in `shardsave._storage.directory`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import stat
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from shardsave._common.backend import native
from shardsave._common.words import human_bytes

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: errno values for a full disk or an exhausted quota.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

#: errno values that are reported as OutOfSpaceError: a full disk, or no memory.
OUT_OF_SPACE = (*DISK_FULL, errno.ENOMEM)

#: errno values of fallocate(2) on a file system that cannot reserve blocks.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_READ_BYTES = 1 << 20


class CallFailed(OSError):
    """An OS call that failed: its name (``call``), and the file or directory that it was about (``path``)."""

    def __init__(self, call: str, path: str, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.call = call
        self.path = path

    @property
    def reason(self) -> str:
        """``fsync: Input/output error``, for a message that names the path elsewhere."""
        return f"{self.call}: {self.strerror}"

    @property
    def words(self) -> str:
        """``fsync of names: Input/output error``."""
        about = f" of {self.path}" if self.path else ""
        return f"{self.call}{about}: {self.strerror}"


class NotRegular(CallFailed):
    """A regular file was expected, something else has its name."""

    def __init__(self, path: str, mode: int) -> None:
        super().__init__("open", path, errno.EINVAL, f"a regular file was expected, it is a {kind_of(mode)}")


class TooLong(CallFailed):
    """A file is longer than a file of its kind may be; it has ``length`` bytes or more."""

    def __init__(self, path: str, limit: int, length: int) -> None:
        super().__init__("read", path, errno.EFBIG, f"at most {limit} bytes were expected, it has {length}")
        self.length = length


def absolute_path(path: str) -> str:
    """The absolute path that ``path`` means now, for a call that runs on while other code may change the current directory.

    Not normalised: only the file system knows what `link/..` means. A relative path is returned as it is if the current directory has
    been removed, or if its own path does not lead this process to it.
    """
    if os.path.isabs(path):
        return path
    try:
        here = os.getcwd()
        if os.path.samestat(os.stat(here), os.stat(os.curdir)):
            return here if path == os.curdir else os.path.join(here, path.removeprefix("./"))
    except OSError:
        pass
    return path


def call(function: Callable[_P, _T], path: str, *arguments: _P.args, **options: _P.kwargs) -> _T:
    """Returns ``function(*arguments, **options)``, an OS call about ``path``. Raises CallFailed."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        raise failed(function.__name__, path, error) from error


def failed(name: str, path: str, error: OSError) -> CallFailed:
    """``error`` of the call ``name`` about ``path``."""
    return CallFailed(name, path, error.errno or 0, error.strerror or str(error))


def kind_of(mode: int) -> str:
    """The kind of a file with this ``mode`` (of `os.stat`), in words."""
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFLNK: "link",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def read_whole(fd: int, path: str, limit: int) -> bytes:
    """Reads an open file from its current position to its end. Raises CallFailed; TooLong if there are more than ``limit`` bytes."""
    parts, length, done = [], call(os.fstat, path, fd).st_size, 0
    while length <= limit and (part := call(os.read, path, fd, _READ_BYTES)):
        parts.append(part)
        done += len(part)
        length = max(length, done)  # some files report length 0 and have no end
    if length > limit:
        raise TooLong(path, limit, length)
    return b"".join(parts)


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Reads ``length`` bytes from ``offset`` on, fewer if the file ends before. Raises CallFailed."""
    parts = []
    while length > 0 and (part := call(os.pread, "", fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def write_all(fd: int, path: str, data: bytes) -> None:
    """Writes all of ``data`` at the beginning of a file; continues after a short write. Raises CallFailed."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += call(os.pwrite, path, fd, view[done:], done)


def map_shared(fd: int, address: int, nbytes: int, flags: int) -> None:
    """Maps the beginning of an open file to ``address``, in the place of what is mapped there; ``flags``: further ones, of mmap(2).

    Calls mmap(2) itself: Python's own cannot say where. Raises CallFailed.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    fixed = mmap.MAP_SHARED | _MAP_FIXED | flags
    if _libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection, fixed, fd, ctypes.c_int64(0)) != address:
        number = ctypes.get_errno()
        raise CallFailed("mmap", "", number, os.strerror(number))


def sync_all(files: Sequence[tuple[int, str]]) -> list[CallFailed | None]:
    """Makes open files and directories (descriptor, path) durable, at the same time, since each waits for the disk.

    Returns what has failed for each. Each is synced once, without a retry: after an error the kernel has dropped the pages, and a second
    fsync would report success.
    """
    if native is not None and len(files) > 1:
        numbers = native.sync_files([fd for fd, _ in files])
        return [CallFailed("fsync", path, n, os.strerror(n)) if n else None for (_, path), n in zip(files, numbers)]
    failures: list[CallFailed | None] = []
    for fd, path in files:
        try:
            call(os.fsync, path, fd)
            failures.append(None)
        except CallFailed as error:
            failures.append(error)
    return failures


def allocate(fd: int, path: str, length: int) -> None:
    """Gives a new file ``length`` bytes, reserved on disk if the file system supports that. Raises CallFailed.

    Calls fallocate(2) itself: posix_fallocate(3) writes to every block if the file system does not support the call.
    """
    if hasattr(_libc, "fallocate"):
        while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
            number = ctypes.get_errno()
            if number in _CANNOT_RESERVE:
                break
            if number == errno.EFBIG:
                limit = "more than the file system or the limit of the process (ulimit -f) allows"
                raise CallFailed(
                    "fallocate", path, number, f"{os.strerror(number)}: {human_bytes(length)} were needed, {limit}"
                )
            if number != errno.EINTR:
                raise CallFailed("fallocate", path, number, os.strerror(number))
        else:
            return
    call(os.ftruncate, path, fd, length)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Starts to write these bytes to disk (sync_file_range(2)), so that the later fsync, which no signal interrupts, is short.

    Errors are ignored: only fsync tells what is on disk.
    """
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_MAP_FIXED = 0x10  # linux/mman-common.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def descriptor_allowance() -> int:
    """How many shards may be held open: half of the descriptors that this process may still open. The rest is for other code."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        in_use = len(os.listdir("/proc/self/fd"))
    except OSError:
        in_use = 0
    return max(1, ((soft if soft != resource.RLIM_INFINITY else 1 << 16) - in_use) // 2)
