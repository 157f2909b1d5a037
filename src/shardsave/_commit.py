"""A directory's transaction: stage, move, commit by one rename, clean.

Everything is relative to one descriptor of the directory. Until the index is renamed, nothing under a name that an index
mentions has been touched; from the attempt on, nothing is abandoned before the index has been read again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

from shardsave._clean import STAGING_PATTERN, clean, files_of, remove_staging
from shardsave._crc64 import crc64
from shardsave._files import allocate, make_folders, read_all, write_all
from shardsave._index import INDEX_NAME, LONE_NAME, Index, Superseded, parse_index, shard_names
from shardsave._lock import DirectoryLock
from shardsave.errors import (
    CorruptCheckpointError,
    DirectoryBusyError,
    DurabilityUncertainError,
    IncompatibleCheckpointError,
    OutOfSpaceError,
    SaveNotCommittedError,
    ShardSaveError,
)

#: Names inside a staging directory, beside the shards.
LIST_NAME, NEW_INDEX_NAME = "names", "index"

_MAX_INDEX_BYTES = 512_000_000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(slots=True)
class StagedShard:
    """A shard that is being written: its final name, its path for messages, and the descriptor that writes it."""

    name: str
    path: str
    fd: int


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """``leftovers``: names that should have been removed and could not be; ``notes``: what a reader of the report should know."""

    leftovers: tuple[str, ...]
    notes: tuple[str, ...]


class Transaction:
    """One save into one directory. Used as a context manager; left without a commit, it removes all that it wrote.

    For one thread. In a forked child it is inert.
    """

    def __init__(self, path: str, lock: DirectoryLock, durable: bool) -> None:
        self.path = path
        self._lock = lock
        self._durable = durable
        self._staging: str | None = None
        self._staging_fd = -1
        self._staged: list[StagedShard] = []
        self._names: tuple[str, ...] = ()
        self._moving: list[str] = []
        self._attempted = False
        self._settled = False
        self._old_bytes: bytes | None = None
        self._old: Index | None = None
        self._old_unreadable = ""
        self._had_lone = False

    @staticmethod
    def begin(directory: str | os.PathLike[str], *, durable: bool, lock_timeout: float) -> Transaction:
        """Creates and locks ``directory``, and makes what is visible in it really committed.

        Waits up to ``lock_timeout`` seconds for other savers. Raises DirectoryBusyError, SaveNotCommittedError.
        """
        path = os.path.abspath(os.fspath(directory))
        try:
            make_folders(path, durable)
            lock = DirectoryLock(path, lock_timeout)
        except OSError as error:
            raise SaveNotCommittedError(f"cannot save to {path}: {_words(error)}; nothing was written") from error
        made = Transaction(path, lock, durable)
        try:
            made._look()
        except BaseException as error:
            made.close()
            if isinstance(error, OSError):
                made._fail("fsync and reading", INDEX_NAME, error)
            raise
        return made

    def _look(self) -> None:
        """Makes the previous commit durable, whoever made it, before anything rests on it; then reads it."""
        if self._durable:
            self._sync_name(INDEX_NAME)
            os.fsync(self._lock.fd)
        self._had_lone = self.superseded() is not None
        self._old_bytes = read_all(INDEX_NAME, self._lock.fd, _MAX_INDEX_BYTES)
        if self._old_bytes is not None:
            try:
                self._old = parse_index(self._old_bytes, f"index {INDEX_NAME}")
            except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
                self._old_unreadable = str(error)

    def _sync_name(self, name: str) -> None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._lock.fd)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def superseded(self) -> Superseded | None:
        """The lone file that this save replaces, if there is one."""
        try:
            found = os.stat(LONE_NAME, dir_fd=self._lock.fd)
        except OSError:
            return None
        return Superseded(found.st_size, found.st_mtime_ns)

    def shard_names(self, count: int) -> tuple[str, ...]:
        """Names for ``count`` shards, none of which is taken in the directory."""
        try:
            taken = set(os.listdir(self._lock.fd))
        except OSError as error:
            self._fail("listing the directory", "", error)
        if self._old is not None:
            taken.update(self._old.weight_map.values())
        names = shard_names(count)
        while not taken.isdisjoint(names):
            names = shard_names(count, secrets.token_hex(4))
        self._names = names
        return names

    def check_space(self, needed: int) -> None:
        """Raises OutOfSpaceError when fewer than ``needed`` bytes are free."""
        there = os.fstatvfs(self._lock.fd)
        free = there.f_bavail * there.f_frsize
        if needed > free:
            raise OutOfSpaceError(f"cannot save to {self.path}: needs {_gb(needed)}, {_gb(free)} free; {self._state()}")

    def create(self, name: str, length: int) -> StagedShard:
        """Makes the staged file of shard ``name``, ``length`` bytes long and reserved where the file system can."""
        try:
            self._make_staging()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            shard = StagedShard(name, os.path.join(self.path, name), -1)
            self._staged.append(shard)
            shard.fd = os.open(name, flags, 0o666, dir_fd=self._staging_fd)
            allocate(shard.fd, length)
        except OSError as error:
            self._fail(f"creating {_gb(length)}", name, error)
        return shard

    def _make_staging(self) -> None:
        if self._staging_fd >= 0:
            return
        self._staging = f".shardsave-{_host_id()}{secrets.token_hex(4)}"
        assert STAGING_PATTERN.fullmatch(self._staging)
        os.mkdir(self._staging, dir_fd=self._lock.fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._staging_fd = os.open(self._staging, flags, dir_fd=self._lock.fd)
        self._sync(self._lock.fd)

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Ends a shard whose data is written: true length, then header, then fsync on this same descriptor, then close."""
        call = "ftruncate"
        try:
            os.ftruncate(shard.fd, length)
            call = "writing the header"
            fcntl.fcntl(shard.fd, fcntl.F_SETFL, fcntl.fcntl(shard.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            write_all(shard.fd, header)
            call = "fsync"
            self._sync(shard.fd)
            call = "close"
            fd, shard.fd = shard.fd, -1
            os.close(fd)
        except OSError as error:
            self._fail(call, shard.name, error)

    def commit(self, index: bytes) -> CommitOutcome:
        """Makes the sealed shards and ``index`` the checkpoint of the directory.

        Raises SaveNotCommittedError, OutOfSpaceError, DirectoryBusyError when nothing was committed, and
        DurabilityUncertainError when the new checkpoint is in place but perhaps not for good.
        """
        try:
            self._move()
            self._publish(index)
        except BaseException as error:
            self._settle(index, error)
        self._settled = True
        return self._clean(index)

    def _move(self) -> None:
        """Gives the shards their final names, after writing down which these are and what the commit will replace."""
        self._make_staging()
        replaced = files_of(self._old) if self._old is not None else ()
        self._write_staged(LIST_NAME, json.dumps([*self._names, *sorted(replaced)]).encode())
        self._sync(self._staging_fd)
        for shard in self._staged:
            self._moving.append(shard.name)
            os.rename(shard.name, shard.name, src_dir_fd=self._staging_fd, dst_dir_fd=self._lock.fd)
        self._sync(self._lock.fd)

    def _publish(self, index: bytes) -> None:
        self._write_staged(NEW_INDEX_NAME, index)
        if read_all(INDEX_NAME, self._lock.fd, _MAX_INDEX_BYTES) != self._old_bytes:
            raise DirectoryBusyError(
                f"cannot save to {self.path}: {INDEX_NAME} was expected to stay as it was, another host replaced it; "
                f"nothing was committed, the other checkpoint is intact"
            )
        self._attempted = True
        os.rename(NEW_INDEX_NAME, INDEX_NAME, src_dir_fd=self._staging_fd, dst_dir_fd=self._lock.fd)
        self._sync(self._lock.fd)

    def _settle(self, index: bytes, error: BaseException) -> None:
        """Finds out what a failed or interrupted commit has become, and raises what is true of it."""
        if not self._attempted:
            self.close()
            if isinstance(error, OSError):
                self._fail("moving the shards and the index into place", INDEX_NAME, error)
            raise error
        self._settled = True
        try:
            found = read_all(INDEX_NAME, self._lock.fd, _MAX_INDEX_BYTES)
        except OSError as unreadable:
            raise DurabilityUncertainError(
                f"cannot tell whether the save was committed: {self.path}/{INDEX_NAME}: {_words(error)}, then the index "
                f"could not be read: {_words(unreadable)}; nothing was removed, the old or the new checkpoint is there"
            ) from error
        if found == self._old_bytes and found != index:
            self._settled = False
            self.close()
            if isinstance(error, OSError):
                self._fail("rename of the index", INDEX_NAME, error)
            raise error
        if not isinstance(error, OSError):
            raise error
        raise DurabilityUncertainError(
            f"saved, but not known to be durable: {self.path}: {_words(error)} after the index was renamed; "
            f"the new checkpoint is in place, a loss of power may bring back the previous one; nothing was removed"
        ) from error

    def _clean(self, index: bytes) -> CommitOutcome:
        notes = [] if self._lock.held else ["the file system has no locks: savers are not ordered"]
        if self._old_unreadable:
            notes.append(f"nothing was removed, since the replaced index cannot be read ({self._old_unreadable})")
        new = parse_index(index, f"index {INDEX_NAME}")
        leftovers = clean(
            self._lock.fd,
            own_staging=self._staging,
            host=_host_id() if self._lock.held else None,
            old=self._old,
            new=new,
            keep_all=bool(self._old_unreadable),
        )
        return CommitOutcome(leftovers, tuple(notes))

    def close(self) -> None:
        """Ends the transaction: removes what is not committed, frees the lock. May be called any number of times."""
        if self._lock.inherited:
            return
        with contextlib.ExitStack() as ending:  # an interrupt in the middle leaves litter for the next save, never a lock
            ending.callback(self._lock.close)
            if self._staging_fd >= 0:
                fd, self._staging_fd = self._staging_fd, -1
                ending.callback(_close_quietly, fd)
            self._abandon()

    def _abandon(self) -> None:
        for shard in self._staged:
            if shard.fd >= 0:
                fd, shard.fd = shard.fd, -1
                _close_quietly(fd)
        if self._lock.fd >= 0 and not self._settled and self._staging is not None:
            named = files_of(self._old) if self._old is not None else frozenset()
            remove_staging(self._lock.fd, self._staging, finals=self._moving, named=named)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write_staged(self, name: str, data: bytes) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=self._staging_fd)
        try:
            write_all(fd, data)
            self._sync(fd)
        finally:
            os.close(fd)

    def _sync(self, fd: int) -> None:
        """fsync, once: after an error the kernel has dropped the pages, and a second call would lie."""
        if self._durable:
            os.fsync(fd)

    def _fail(self, call: str, name: str, error: OSError) -> NoReturn:
        raise self.failure(call, name, error.errno or 0, error.strerror or "", None) from error

    def failure(self, call: str, name: str, number: int, reason: str, needed: int | None) -> ShardSaveError:
        """The error for a call that failed before the commit, of the class that its error number asks for."""
        room = ""
        if number in _NO_ROOM and self._lock.fd >= 0:
            there = os.fstatvfs(self._lock.fd)
            wanted = f"needs {_gb(needed)}, " if needed is not None else ""
            room = f" ({wanted}{_gb(there.f_bavail * there.f_frsize)} free)"
        kind = OutOfSpaceError if number in (*_NO_ROOM, errno.ENOMEM) else SaveNotCommittedError
        reason = reason or os.strerror(number)
        return kind(f"cannot write {os.path.join(self.path, name)}: {call}: {reason}{room}; {self._state()}")

    def _state(self) -> str:
        if self._old_bytes is None and not self._had_lone:
            return "nothing was committed, there was no checkpoint before"
        return "nothing was committed, the previous checkpoint is intact"


def _close_quietly(fd: int) -> None:
    """Closes what is abandoned, or was only read: an error here changes nothing that was promised."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _host_id() -> str:
    """Eight hex digits for this host: what its savers leave behind is known to be dead by whoever holds the lock here."""
    try:
        with open("/etc/machine-id", "rb") as file:
            machine = file.read(64)
    except OSError:
        machine = b""
    return f"{crc64(platform.node().encode() + machine) & 0xFFFF_FFFF:08x}"


def _words(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else type(error).__name__


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count} bytes"
