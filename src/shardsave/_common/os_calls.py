"""The OS calls that a commit is made of, each naming itself and its file when it fails."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: Of directories of others, which may not even be opened.
_MAY_NOT_SYNC = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EOPNOTSUPP)

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class CallFailed(OSError):
    """An OS call that failed: its name (``call``), and the file or directory that it was about (``path``)."""

    def __init__(self, call: str, path: str, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.call = call
        self.path = path


def call(function: Callable[_P, _T], path: str, *arguments: _P.args, **options: _P.kwargs) -> _T:
    """``function(*arguments, **options)``, an OS call about ``path``. Raises CallFailed."""
    try:
        return function(*arguments, **options)
    except OSError as error:
        raise CallFailed(function.__name__, path, error.errno or 0, error.strerror or str(error)) from error


class Descriptor:
    """A file or directory that can be opened, closed at the latest when nobody has this object any more.

    Opening and closing are one C call each: an interrupt comes between two instructions of Python, and finds a number that is
    either noted here or not open. As a context manager it closes what was only read.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        _alive.add(self)

    def open(self, path: str, flags: int, folder_fd: int | None = None, mode: int = 0o666) -> None:
        """Opens ``path``. Raises CallFailed."""
        opener = functools.partial(os.open, mode=mode, dir_fd=folder_fd)
        try:
            self._numbers.extend(map(opener, (path,), (flags | os.O_CLOEXEC,)))
        except OSError as error:
            raise CallFailed("open", path, error.errno or 0, error.strerror or str(error)) from error

    @property
    def fd(self) -> int:
        """The number, or -1 when nothing is open."""
        return self._numbers[0] if self._numbers else -1

    def close(self, path: str) -> None:
        """Closes ``path``, which was written: a failure counts. Raises CallFailed."""
        try:
            deque(map(os.close, map(list.pop, [self._numbers] * len(self._numbers))), maxlen=0)
        except OSError as error:
            raise CallFailed("close", path, error.errno or 0, error.strerror or str(error)) from error

    def abandon(self) -> None:
        """Closes what was only read, or is given up: a failure changes nothing that was promised."""
        with suppress(CallFailed):
            self.close("")

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon()

    def __del__(self) -> None:
        self.abandon()


#: Every descriptor of this process that may be open.
_alive: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _abandon_in_child() -> None:
    """A forked child keeps no file alive that is replaced, and no lock when it lives on and its parent is killed."""
    for descriptor in list(_alive):
        descriptor.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)


def allocate(fd: int, path: str, length: int) -> None:
    """Sizes a new file to ``length`` bytes, with its blocks reserved where the file system can. Raises CallFailed.

    fallocate(2) itself: posix_fallocate(3) writes every block where the file system has no such call.
    """
    if hasattr(_libc, "fallocate"):
        while _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(length)) != 0:
            number = ctypes.get_errno()
            if number in _UNSUPPORTED:
                break
            if number != errno.EINTR:
                raise CallFailed("fallocate", path, number, os.strerror(number))
        else:
            return
    call(os.ftruncate, path, fd, length)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Lets the disk begin with these bytes (sync_file_range(2)), so that the fsync to come, which no signal ends, is short.

    An error means nothing: only fsync says what is on disk.
    """
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_libc = ctypes.CDLL(None, use_errno=True)


def write_all(fd: int, path: str, data: bytes) -> None:
    """Writes all of ``data`` at the beginning of a file; a short count goes on where it ended. Raises CallFailed."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += call(os.pwrite, path, fd, view[done:], done)


def open_regular(file: Descriptor, name: str, folder_fd: int, *, follow: bool = True) -> bool:
    """Opens the regular file ``name`` for reading; False where there is none. Raises CallFailed.

    Anything else is an error, without ``follow`` a symbolic link too, and is not even opened: that alone can make a device act.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        _refuse_unless_regular(call(os.stat, name, name, dir_fd=folder_fd, follow_symlinks=follow), name)
        file.open(name, flags, folder_fd)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    _refuse_unless_regular(call(os.fstat, name, file.fd), name)  # it may have been replaced in between
    return True


def _refuse_unless_regular(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CallFailed("open", name, errno.EINVAL, f"a regular file was expected, it is a {kind_of(status.st_mode)}")


def kind_of(mode: int) -> str:
    """What kind of file it is, in words."""
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


def read_all(name: str, folder_fd: int, limit: int, *, follow: bool = True) -> bytes | None:
    """The content of the regular file ``name``, None where there is none. Raises CallFailed."""
    with Descriptor() as file:
        if not open_regular(file, name, folder_fd, follow=follow):
            return None
        parts, length, done = [], call(os.fstat, name, file.fd).st_size, 0
        while length <= limit and (part := call(os.read, name, file.fd, 1 << 20)):
            parts.append(part)
            done += len(part)
            length = max(length, done)  # some files say 0 and have no end
        if length > limit:
            raise CallFailed("read", name, errno.EFBIG, f"at most {limit} bytes were expected, it has {length}")
        return b"".join(parts)


def is_regular(name: str, folder_fd: int) -> bool:
    """Whether ``name`` itself, not what it may link to, is a regular file that is there."""
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def read_at(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes from ``offset`` on, fewer where the file ends before. Raises CallFailed."""
    parts = []
    while length > 0 and (part := call(os.pread, "", fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def inode_of(name: str, folder_fd: int) -> tuple[int, int] | None:
    """What tells the file ``name`` from every other, None where there is none. Raises CallFailed."""
    try:
        status = call(os.stat, name, name, dir_fd=folder_fd, follow_symlinks=False)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return status.st_dev, status.st_ino


def make_folders(path: str, durable: bool) -> None:
    """Creates ``path`` and what is missing above it, outermost first; ``durable``: each entered durably into its parent.

    Those that were there are entered, too: nobody knows whether who made them has done so. Raises CallFailed.
    """
    missing, there = [], path
    while not _is_folder(there):
        missing.append(there)
        there = os.path.dirname(there)
    if durable:
        _enter_durably(there)
    for folder in reversed(missing):
        try:
            call(os.mkdir, folder, folder)
        except CallFailed:
            if not _is_folder(folder):
                raise
        if durable:
            _sync_folder(os.path.dirname(folder))


def _enter_durably(path: str) -> None:
    """Makes the names of ``path`` and of the directories above it durable, up to its file system's root, where that is allowed."""
    device = call(os.stat, path, path).st_dev
    while (parent := os.path.dirname(path)) != path:
        if call(os.stat, parent, parent).st_dev != device:
            return
        try:
            _sync_folder(parent)
        except CallFailed as error:
            if error.errno not in _MAY_NOT_SYNC:
                raise
        path = parent


def _is_folder(path: str) -> bool:
    """Whether a directory is there; something else in its place is an error. Raises CallFailed."""
    try:
        mode = call(os.stat, path, path).st_mode
    except CallFailed as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    if not stat.S_ISDIR(mode):
        raise CallFailed("mkdir", path, errno.EEXIST, f"a directory was expected, it is a {kind_of(mode)}")
    return True


def _sync_folder(path: str) -> None:
    """Makes durable which names the directory ``path`` has. Raises CallFailed."""
    with Descriptor() as folder:
        folder.open(path, os.O_RDONLY | os.O_DIRECTORY)
        call(os.fsync, path, folder.fd)


def descriptor_allowance() -> int:
    """How many shards may be held open: half of what this process may open yet, so that the rest of it can go on."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        in_use = len(os.listdir("/proc/self/fd"))
    except OSError:
        in_use = 0
    return max(1, ((soft if soft != resource.RLIM_INFINITY else 1 << 16) - in_use) // 2)
