"""The lock that orders savers of one host: flock(2) on the directory itself."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time

from shardsave._common.os_calls import CallFailed, Descriptor, call
from shardsave._common.shutdown import raise_if_ending
from shardsave.errors import DirectoryBusyError

_POLL_SECONDS = 0.05
_AS_BEFORE = "nothing was written, the previous checkpoint is intact"


class DirectoryLock:
    """A descriptor of a directory that holds its lock, where the file system has locks.

    The lock goes with the descriptor: it is closed and never unlocked, since unlocking in a forked child would free the
    parent's lock too (flock(2)). A child's copy is closed right after the fork, as every `Descriptor` is.
    """

    def __init__(self) -> None:
        self.held = True
        self._pid = os.getpid()
        self._folder = Descriptor()
        self._got: list[None] = []  # one entry once the lock was got

    def acquire(self, path: str, timeout: float, *, purpose: str = "save to", state: str = _AS_BEFORE) -> None:
        """Waits up to ``timeout`` seconds for the lock of the directory ``path``. Raises DirectoryBusyError, CallFailed.

        ``purpose`` and ``state`` are for the message: what cannot be done, and what is true when it is not.
        """
        deadline = time.monotonic() + timeout
        _locks_of_this_thread().append(self)
        while True:
            self._folder.open(path, os.O_RDONLY | os.O_DIRECTORY)
            self._wait(path, timeout, deadline, purpose, state)
            if self.is_still(path):
                return
            self._got.clear()
            self._folder.abandon()

    @property
    def fd(self) -> int:
        """The locked directory's descriptor, -1 before and after."""
        return self._folder.fd

    def _wait(self, path: str, timeout: float, deadline: float, purpose: str, state: str) -> None:
        while True:
            raise_if_ending()
            try:
                # Noted by the same C call, or a save in a signal handler could come in between and wait for us.
                return self._got.extend(map(fcntl.flock, (self.fd,), (fcntl.LOCK_EX | fcntl.LOCK_NB,)))
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    self.held = False
                    return
                if error.errno != errno.EWOULDBLOCK:
                    raise CallFailed("flock", path, error.errno or 0, error.strerror or str(error)) from error
            if any(other._got and other._names_same_as(self) for other in _locks_of_this_thread()):
                raise DirectoryBusyError(
                    f"cannot {purpose} {path}: its lock was expected, a save of this same thread holds it, which is interrupted "
                    f"(by a signal handler or a callback) and could not go on while this one waits; {state}"
                )
            if time.monotonic() >= deadline:
                raise DirectoryBusyError(
                    f"cannot {purpose} {path}: its lock was expected within {timeout:g} s, another save holds it; {state}"
                )
            time.sleep(_POLL_SECONDS)

    def is_still(self, path: str) -> bool:
        """Whether ``path`` still names the directory that was locked, and not one that took its place while we waited."""
        try:
            there = call(os.stat, path, path)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        mine = call(os.fstat, path, self.fd)
        return os.path.samestat(there, mine)

    def _names_same_as(self, other: DirectoryLock) -> bool:
        return self.fd >= 0 and other.fd >= 0 and os.path.samestat(os.fstat(self.fd), os.fstat(other.fd))

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy, which must not touch anything."""
        return os.getpid() != self._pid

    def close(self) -> None:
        self._folder.abandon()
        own = _locks_of_this_thread()
        if self in own:
            own.remove(self)


_threads = threading.local()


def _locks_of_this_thread() -> list[DirectoryLock]:
    """Those that are held or waited for: more than one where a save is made in the middle of another."""
    if not hasattr(_threads, "locks"):
        _threads.locks = []
    own: list[DirectoryLock] = _threads.locks
    return own
