"""The lock that orders the savers of one host: flock(2) on the directory itself."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable

from shardsave._common.os_calls import CallFailed, call
from shardsave._common.shutdown import raise_if_ending
from shardsave._format.file_names import INDEX_NAME
from shardsave._storage.directory import Directory
from shardsave._storage.lock_holder import lock_holder
from shardsave._storage.staging import LIST_NAME, Staging, host_id, owner_of
from shardsave.errors import DirectoryBusyError

_POLL_SECONDS = 0.05
_AS_BEFORE = "nothing was written, the previous checkpoint is intact"

#: errno values of flock(2) on a file system that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

#: errno values of mkdir(2) if this process may not create anything in a directory.
_MAY_NOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)


class LockedDirectory(Directory):
    """The directory at ``path``. `acquire` opens it, and locks it if the file system has locks.

    The lock ends when the descriptor is closed. It is never unlocked: unlocking in a forked child would free the parent's lock too
    (flock(2)). A child's copy of the descriptor is closed right after the fork, as every `Descriptor` is.

    ``exclusive``: False if the file system has no locks; other savers may then write into this directory at the same time.
    ``owner``: the user id of files that this process creates in it; None until `learn_owner`.
    """

    def __init__(self, path: str, *, durable: bool) -> None:
        super().__init__(durable=durable)
        self.path = path
        self.exclusive = True
        self.owner: int | None = None
        self._status: os.stat_result | None = None
        self._pid = os.getpid()
        self._locked: list[None] = []  # one element once the lock is held
        self._seen: list[os.stat_result | None] = []  # the status of the index when this process began to wait, if it had to

    def acquire(
        self,
        timeout: float,
        *,
        purpose: str = "save to",
        state: str = _AS_BEFORE,
        waiting: Callable[[], object] = raise_if_ending,
    ) -> None:
        """Opens the directory and waits up to ``timeout`` seconds for its lock. Raises DirectoryBusyError, CallFailed.

        ``purpose`` and ``state`` are for the message: what cannot be done, and in which state that leaves the directory. ``waiting`` is
        called again and again; what it raises is raised.
        """
        deadline = time.monotonic() + timeout
        _locks_of_this_thread().add(self)
        while True:
            self.open_for_writing(self.path)
            self._seen.clear()
            self._wait(timeout, deadline, purpose, state, waiting)
            if self.is_in_place():
                return
            self._locked.clear()
            super().close()

    def _wait(self, timeout: float, deadline: float, purpose: str, state: str, waiting: Callable[[], object]) -> None:
        while True:
            waiting()
            try:
                # Locked and noted in one C call: otherwise a signal handler could run in between, and a save in it would wait for this one.
                return self._locked.extend(map(fcntl.flock, (self.fd,), (fcntl.LOCK_EX | fcntl.LOCK_NB,)))
            except OSError as error:
                if error.errno in NO_LOCKS:
                    self.exclusive = False
                    return
                if error.errno != errno.EWOULDBLOCK:
                    raise CallFailed("flock", self.path, error.errno or 0, error.strerror or str(error)) from error
            if not self._seen:
                self._seen.append(self.status_of(INDEX_NAME))
            if any(other._locked and other._is_same_directory(self) for other in _locks_of_this_thread()):
                raise DirectoryBusyError(
                    f"cannot {purpose} {self.path}: its lock was expected, a save on this same thread holds it; that save is "
                    f"interrupted (by a signal handler or a callback) and could not continue while this one waits; {state}"
                )
            if time.monotonic() >= deadline:
                holder = lock_holder(self.fd)
                raise DirectoryBusyError(
                    f"cannot {purpose} {self.path}: its lock was expected within {timeout:g} s, another save holds it"
                    f"{holder and f' ({holder})'}; {state}"
                )
            time.sleep(_POLL_SECONDS)

    def was_overtaken(self) -> bool:
        """Whether another process committed a checkpoint here while this one waited for the lock."""
        return any(_identity(status) != _identity(self.status_of(INDEX_NAME)) for status in self._seen)

    def is_in_place(self) -> bool:
        """Whether the path still leads to the directory that was locked, and not to another one that has replaced it."""
        try:
            status = call(os.stat, self.path, self.path)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        self._status = call(os.fstat, self.path, self.fd)
        return os.path.samestat(status, self._status)

    @property
    def shared(self) -> bool:
        """Whether every user may create files in it. Then only what this user made there is obeyed."""
        return self._has_mode(stat.S_IWOTH)

    @property
    def sticky(self) -> bool:
        """Whether only the owner of a file, and the directory's owner, may replace or remove it."""
        return self._has_mode(stat.S_ISVTX)

    def _has_mode(self, bit: int) -> bool:
        assert self._status is not None, "the directory is not locked"
        return bool(self._status.st_mode & bit)

    def learn_owner(self, made: Directory) -> None:
        """Learns whose files are ours: the owner of ``made``, which this process has just created in this directory.

        The process's user id does not tell this: a server may give files to another user (NFS with root_squash, FUSE).
        """
        self.owner = call(os.fstat, made.name, made.fd).st_uid

    def is_ours(self, status: os.stat_result) -> bool:
        """Whether the file with this ``status`` may be removed. In a shared directory, it must be one of this user."""
        return not self.shared or status.st_uid == self.owner

    def obeys(self, name: str) -> bool:
        """Whether a save may do what the index or the staging directory ``name`` says.

        In a shared directory, only if nobody but this user can have made it: neither by a link (a hard link has the owner of the
        file that it leads to) nor by writing to it. That a group may write there is enough to refuse it.
        """
        if not self.shared:
            return True
        status = self.status_of(name)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return self._is_own_file(status)
        return self._is_closed(status) and self._holds_only_ours(name)

    def _is_closed(self, status: os.stat_result) -> bool:
        """Whether the file is one of this user, and nobody else may write to it. With an ACL, the group's bits show what it permits."""
        return status.st_uid == self.owner and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def _is_own_file(self, status: os.stat_result | None) -> bool:
        if status is None or not stat.S_ISREG(status.st_mode):
            return False
        return self._is_closed(status) and status.st_nlink == 1

    def _holds_only_ours(self, staging: str) -> bool:
        """Whether all files in ``staging`` are this user's, and nobody else can have changed its list.

        Others may have written to the directory until its mode was changed.
        """
        try:
            with self.enter(staging) as inside:
                statuses = {name: inside.status_of(name) for name in inside.names()}
        except CallFailed as error:
            return error.errno == errno.EACCES  # created under a umask that denies even its owner; it is empty
        if not all(status is None or status.st_uid == self.owner for status in statuses.values()):
            return False
        return LIST_NAME not in statuses or self._is_own_file(statuses[LIST_NAME])

    def check_replaceable(self, name: str) -> None:
        """Raises CallFailed if another user has a file called ``name`` that this user may not replace."""
        if not self.sticky or self._status is None or self.owner in (None, 0, self._status.st_uid):
            return
        status = self.status_of(name)
        if status is not None and status.st_uid != self.owner:
            reason = f"it belongs to user {status.st_uid}, and in this directory (sticky) nobody else may replace it"
            raise CallFailed("rename", name, errno.EPERM, reason)

    def _is_same_directory(self, other: LockedDirectory) -> bool:
        return self.fd >= 0 and other.fd >= 0 and os.path.samestat(os.fstat(self.fd), os.fstat(other.fd))

    def knows_dead(self, staging: str) -> bool:
        """Whether ``staging`` is the staging directory of a saver that is certainly dead.

        This is only known for savers of this host, which would hold the lock if they were alive, and only if the file system has
        locks. In a shared directory, it must be known to be one of this user.
        """
        return self.exclusive and owner_of(staging) == host_id() and self.obeys(staging)

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child's copy, which must not touch anything."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Frees the lock. May be called any number of times."""
        super().close()
        _locks_of_this_thread().discard(self)


def _identity(status: os.stat_result | None) -> tuple[int, ...] | None:
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status is not None else None


def learn_owner(folder: LockedDirectory) -> None:
    """In a shared directory: learns from a new directory which owner our files have there. Raises CallFailed."""
    if not folder.shared:
        return
    probe = Staging(folder, folder.path)
    try:
        probe.make()
        folder.learn_owner(probe.directory)
    except CallFailed as error:
        if error.errno not in _MAY_NOT_WRITE:
            raise
        return  # nothing there is ours
    finally:
        probe.close()
    folder.rmdir(probe.name)


_threads = threading.local()


def _locks_of_this_thread() -> weakref.WeakSet[LockedDirectory]:
    """The locks that this thread holds or waits for: more than one if a save interrupts another save on the same thread.

    A lock that was not closed, because of an interrupt, is freed with the last reference to its directory.
    """
    if not hasattr(_threads, "locks"):
        _threads.locks = weakref.WeakSet()
    locks: weakref.WeakSet[LockedDirectory] = _threads.locks
    return locks
