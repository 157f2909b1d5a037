"""The lock that orders the savers of one host: flock(2) on the directory itself."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time

from shardsave._common.os_calls import CallFailed, call
from shardsave._common.shutdown import raise_if_ending
from shardsave._storage.directory import Directory
from shardsave._storage.staging import host_id, owner_of
from shardsave.errors import DirectoryBusyError

_POLL_SECONDS = 0.05
_AS_BEFORE = "nothing was written, the previous checkpoint is intact"

#: errno values of flock(2) on a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class LockedDirectory(Directory):
    """The directory at ``path``, which `acquire` opens and locks, where the file system has locks.

    The lock goes with the descriptor: it is closed and never unlocked, since unlocking in a forked child would free the
    parent's lock too (flock(2)). A child's copy is closed right after the fork, as every `Descriptor` is.

    ``exclusive``: False where the file system has no locks, so that other savers may be at work here.
    """

    def __init__(self, path: str, *, durable: bool) -> None:
        super().__init__(durable=durable)
        self.path = path
        self.exclusive = True
        self._pid = os.getpid()
        self._locked: list[None] = []  # one element once the lock is held

    def acquire(self, timeout: float, *, purpose: str = "save to", state: str = _AS_BEFORE) -> None:
        """Opens the directory and waits up to ``timeout`` seconds for its lock. Raises DirectoryBusyError, CallFailed.

        ``purpose`` and ``state`` are for the message: what cannot be done, and the state that things are in then.
        """
        deadline = time.monotonic() + timeout
        _locks_of_this_thread().append(self)
        while True:
            self.open(self.path)
            self._wait(timeout, deadline, purpose, state)
            if self.is_in_place():
                return
            self._locked.clear()
            super().close()

    def _wait(self, timeout: float, deadline: float, purpose: str, state: str) -> None:
        while True:
            raise_if_ending()
            try:
                # Noted by the same C call: otherwise a save in a signal handler could come in between, and wait for this one.
                return self._locked.extend(map(fcntl.flock, (self.fd,), (fcntl.LOCK_EX | fcntl.LOCK_NB,)))
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    self.exclusive = False
                    return
                if error.errno != errno.EWOULDBLOCK:
                    raise CallFailed("flock", self.path, error.errno or 0, error.strerror or str(error)) from error
            if any(other._locked and other._is_same_directory(self) for other in _locks_of_this_thread()):
                raise DirectoryBusyError(
                    f"cannot {purpose} {self.path}: its lock was expected, a save of this same thread holds it, which is "
                    f"interrupted (by a signal handler or a callback) and could not go on while this one waits; {state}"
                )
            if time.monotonic() >= deadline:
                raise DirectoryBusyError(
                    f"cannot {purpose} {self.path}: its lock was expected within {timeout:g} s, another save holds it; {state}"
                )
            time.sleep(_POLL_SECONDS)

    def is_in_place(self) -> bool:
        """Whether the path still leads to the directory that was locked, and not to one that took its place meanwhile."""
        try:
            there = call(os.stat, self.path, self.path)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return os.path.samestat(there, call(os.fstat, self.path, self.fd))

    def _is_same_directory(self, other: LockedDirectory) -> bool:
        return self.fd >= 0 and other.fd >= 0 and os.path.samestat(os.fstat(self.fd), os.fstat(other.fd))

    def knows_dead(self, staging: str) -> bool:
        """Whether ``staging`` is the staging directory of a saver that is certainly dead.

        Of this host only, where a living saver would hold the lock; and only where the file system has locks.
        """
        owner = owner_of(staging)
        return self.exclusive and owner is not None and owner == host_id()

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy, which must not touch anything."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Frees the lock. May be called any number of times."""
        super().close()
        own = _locks_of_this_thread()
        if self in own:
            own.remove(self)


_threads = threading.local()


def _locks_of_this_thread() -> list[LockedDirectory]:
    """Those that are held or waited for: more than one where a save runs in the middle of another."""
    if not hasattr(_threads, "locks"):
        _threads.locks = []
    locks: list[LockedDirectory] = _threads.locks
    return locks
