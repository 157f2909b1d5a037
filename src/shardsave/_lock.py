"""The lock that orders savers of one host: flock(2) on the directory itself."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref

from shardsave.errors import DirectoryBusyError

_POLL_SECONDS = 0.05


class DirectoryLock:
    """A descriptor of a directory that holds its lock, where the file system has locks.

    The lock goes with the descriptor: it is closed and never unlocked, since unlocking in a forked child would free the
    parent's lock too (flock(2)). A child closes its copy right after the fork, so that it keeps no lock when it lives on.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.held = True
        self._pid = os.getpid()
        deadline = time.monotonic() + timeout
        while True:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _live.add(self)
            try:
                self._wait(path, timeout, deadline)
                if self._is_still(path):
                    return
            except BaseException:
                self.close()
                raise
            self.close()

    def _wait(self, path: str, timeout: float, deadline: float) -> None:
        while True:
            try:
                return fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    self.held = False
                    return
                if error.errno != errno.EWOULDBLOCK:
                    raise
            if time.monotonic() >= deadline:
                raise DirectoryBusyError(
                    f"cannot save to {path}: its lock was expected within {timeout:g} s, another save holds it; "
                    f"nothing was written, the previous checkpoint is intact"
                )
            time.sleep(_POLL_SECONDS)

    def _is_still(self, path: str) -> bool:
        """Whether ``path`` still names the directory that was locked, and not one that took its place while we waited."""
        try:
            there = os.stat(path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self.fd)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy, which must not touch anything."""
        return os.getpid() != self._pid

    def close(self) -> None:
        _live.discard(self)
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)


_live: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_live):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)
