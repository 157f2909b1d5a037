"""The few OS calls that a commit is made of, where Python's own are not quite what is needed."""

from __future__ import annotations

import ctypes
import errno
import os
import stat

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def allocate(fd: int, length: int) -> None:
    """Sizes a new file to ``length`` bytes, with its blocks reserved where the file system can.

    fallocate(2) itself: posix_fallocate(3) writes every block where the file system has no such call.
    """
    if hasattr(_libc, "fallocate"):
        while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
            number = ctypes.get_errno()
            if number in _UNSUPPORTED:
                break
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        else:
            return
    os.ftruncate(fd, length)


_libc = ctypes.CDLL(None, use_errno=True)


def write_all(fd: int, data: bytes, offset: int = 0) -> None:
    """Writes all of ``data`` at ``offset``; a short count goes on where it ended."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def read_all(name: str, folder_fd: int, limit: int) -> bytes | None:
    """The content of the regular file ``name``, None where there is none, OSError where it cannot be read."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes")
        parts = []
        while part := os.read(fd, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def is_regular(name: str, folder_fd: int) -> bool:
    """Whether ``name`` itself, not what it may link to, is a regular file that is there."""
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def make_folders(path: str, durable: bool) -> None:
    """Creates ``path`` and what is missing above it, each entered durably into its parent, outermost first."""
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        parent = os.path.dirname(path)
        if parent == path:
            break
        path = parent
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise
        if durable:
            fd = os.open(os.path.dirname(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
