"""Open files that are always closed: at the latest when nobody refers to them any more, after an interrupt too, and in a forked child."""

from __future__ import annotations

import errno
import functools
import os
import stat
import weakref
from collections import deque
from contextlib import suppress
from types import TracebackType

from shardsave._common.os_calls import CallFailed, NotRegular, call, failed, write_all


class Descriptor:
    """A file or directory that can be opened. It is closed at the latest when this object is garbage.

    Opening and closing are one C call each: an interrupt comes between two instructions of Python, and at that moment the number
    is either noted here or not open. As a context manager it closes a file that was only read.

    While it is open, its class is `_OpenDescriptor`. One that is closed has no `__del__`, where Python would ignore an interrupt.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def open(self, path: str, flags: int, folder_fd: int | None = None, mode: int = 0o666) -> None:
        """Opens ``path``. Raises CallFailed."""
        self._begin()
        opener = functools.partial(os.open, mode=mode, dir_fd=folder_fd)
        try:
            self._numbers.extend(map(opener, (path,), (flags | os.O_CLOEXEC,)))
        except OSError as error:
            self._end()
            raise failed("open", path, error) from error

    def open_in_memory(self) -> None:
        """Creates a file that lies in memory and has no name. Raises CallFailed."""
        self._begin()
        try:
            self._numbers.extend(map(os.memfd_create, ("shardsave",), (os.MFD_CLOEXEC,)))
        except OSError as error:
            self._end()
            raise failed("memfd_create", "", error) from error

    @classmethod
    def of(cls, fd: int) -> Descriptor:
        """One that is open already, for example because another process sent it."""
        file = cls()
        file._begin()
        file._numbers.append(fd)
        return file

    @property
    def fd(self) -> int:
        """The number, or -1 when nothing is open."""
        return self._numbers[0] if self._numbers else -1

    def close(self, path: str) -> None:
        """Closes ``path``, which was written: a failure to close may be a failure to write. Raises CallFailed."""
        try:
            deque(map(os.close, map(list.pop, [self._numbers] * len(self._numbers))), maxlen=0)
        except OSError as error:
            raise failed("close", path, error) from error
        finally:
            self._end()

    def _begin(self) -> None:
        """Takes care that what is opened next will be closed."""
        self.__class__ = _OpenDescriptor
        _open.add(self)

    def _end(self) -> None:
        if not self._numbers and type(self) is not Descriptor:
            _open.discard(self)
            self.__class__ = Descriptor

    def abandon(self) -> None:
        """Closes a file that was only read, or that is given up: a failure breaks no promise."""
        with suppress(CallFailed):
            self.close("")

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon()


class _OpenDescriptor(Descriptor):
    """One that may be open."""

    def __del__(self) -> None:
        self.abandon()


#: Every descriptor of this process that may be open.
_open: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _abandon_in_child() -> None:
    """Closes all descriptors in a forked child: it must not keep replaced files on disk, nor a lock after its parent was killed."""
    for descriptor in list(_open):
        descriptor.abandon()


os.register_at_fork(after_in_child=_abandon_in_child)


def open_regular(path: str, folder_fd: int | None = None, *, follow: bool = True) -> Descriptor | None:
    """Opens the regular file ``path``, relative to ``folder_fd``, for reading; returns None where there is nothing.

    Raises CallFailed; NotRegular for anything but a regular file (without ``follow``, also for a symbolic link). That is not even
    opened: opening alone can make a device act, or wake the writer of a FIFO.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    file = Descriptor()
    try:
        try:
            _refuse_unless_regular(call(os.stat, path, path, dir_fd=folder_fd, follow_symlinks=follow), path)
            file.open(path, flags, folder_fd)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        # Outside the inner try: an opened file must never count as missing. If an index did, the files that it names could be removed.
        _refuse_unless_regular(call(os.fstat, path, file.fd), path)  # it may have been replaced in between
    except BaseException:
        file.abandon()
        raise
    return file


def _refuse_unless_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegular(path, status.st_mode)


def file_in_memory(start: bytes, length: int) -> Descriptor:
    """A file of ``length`` bytes that has no name, and no memory but that of ``start``; all other bytes are zero. Raises CallFailed."""
    file = Descriptor()
    file.open_in_memory()
    write_all(file.fd, "", start)
    call(os.ftruncate, "", file.fd, length)
    return file
