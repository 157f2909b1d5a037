"""A directory's transaction: stage, move, commit by one rename, clean.

Everything is relative to one descriptor of the directory. Until the index is renamed, nothing under a name that an index
mentions has been touched; from the attempt on, nothing is abandoned before the index has been read again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed, call, inode_of, make_folders, read_all
from shardsave._common.words import count, human_bytes, some
from shardsave._format.file_names import INDEX_NAME, LONE_NAME, part_name, shard_names
from shardsave._format.index import MAX_INDEX_BYTES, FileRecord, Index, Superseded, encode_index
from shardsave._format.index_parsing import parse_index
from shardsave._storage.cleanup import clean, files_of, remove_dead_staging, remove_staging, staging_of_others
from shardsave._storage.companions import StagedCompanions, finish_dead_savers
from shardsave._storage.lock import DirectoryLock
from shardsave._storage.staging import NO_LINKS, STAGING_PATTERN, StagedShard, Staging, host_id, sync_file, sync_there
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

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class CommitOutcome(NamedTuple):
    """``leftovers``: names that should have been removed and could not be; ``notes``: what a reader of the report should know."""

    leftovers: tuple[str, ...]
    notes: tuple[str, ...]


class Transaction:
    """One save into one directory: entered, it holds the lock; left without a commit, it removes all that it wrote.

    For one thread. In a forked child it is inert.
    """

    def __init__(self, directory: str | os.PathLike[str], *, durable: bool, lock_timeout: float) -> None:
        # Not normalised: what `link/..` means, the file system knows.
        given = os.fspath(directory)
        self.path = given if os.path.isabs(given) else os.path.join(_current_directory(given), given)
        self.supersedes: Superseded | None = None  # the lone file that this save replaces
        self._durable = durable
        self._lock_timeout = lock_timeout
        self._lock = DirectoryLock()
        self._staging = Staging(durable=durable)
        self._staged: list[str] = []  # the names of what is to be moved
        self._names: list[str] = []
        self._moving: list[str] = []
        self._companions = StagedCompanions(self._staging, durable=durable)
        self._attempted = False
        self._committed = False
        self._settled = False
        self._old_bytes: bytes | None = None
        self._old: Index | None = None
        self._old_unreadable = ""
        self._looked = False  # whether it is known what was there before

    def __enter__(self) -> Transaction:
        """Creates and locks the directory, and makes what is visible in it really committed.

        Waits up to ``lock_timeout`` seconds for other savers. Raises DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError.
        """
        try:
            self._lock_directory()
            self._look()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lock_directory(self) -> None:
        try:
            make_folders(self.path, self._durable)
            self._lock.acquire(self.path, self._lock_timeout)
        except CallFailed as error:
            kind = OutOfSpaceError if error.errno in _NO_ROOM else SaveNotCommittedError
            raise kind(f"cannot save to {self.path}: {_words(error)}; nothing was written") from error

    @contextlib.contextmanager
    def _before_commit(self) -> Iterator[None]:
        """An OS call that fails in here means that nothing was committed."""
        try:
            yield
        except CallFailed as error:
            raise self.failure(error.call, error.path, error.errno or 0, error.strerror or "", None) from error

    def _look(self) -> None:
        """Makes the previous commit durable, whoever made it, before anything rests on it; then reads it."""
        with self._before_commit():
            if self._durable:
                sync_there(INDEX_NAME, self._lock.fd, wanted=True)
                self._sync(self._lock.fd, "")
            self.supersedes = self._find_lone()
            self._old_bytes = read_all(INDEX_NAME, self._lock.fd, MAX_INDEX_BYTES)
        self._looked = True
        if self._old_bytes is not None:
            try:
                self._old = parse_index(self._old_bytes, f"index {INDEX_NAME}")
            except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
                self._old_unreadable = str(error)
        if self._old is not None and self._old.record is not None:
            with self._before_commit():
                if finish_dead_savers(self._lock.fd, self._old.record.companions, self._is_dead):
                    self._sync(self._lock.fd, "")

    def _find_lone(self) -> Superseded | None:
        try:
            found = call(os.stat, LONE_NAME, LONE_NAME, dir_fd=self._lock.fd)
        except CallFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        return Superseded(found.st_size, found.st_mtime_ns)

    def shard_names(self, count: int) -> tuple[str, ...]:
        """Names for ``count`` shards, none of which is taken in the directory."""
        taken = self._taken()
        names = shard_names(count)
        while not taken.isdisjoint(names):
            names = shard_names(count, secrets.token_hex(4))
        self._names.extend(names)
        return names

    def part_name(self, stem: str, extension: str) -> str:
        """A name for a part of the checkpoint that is no shard: one that was never used before."""
        name = part_name(stem, secrets.token_hex(4), extension)
        while name in self._taken() or name in self._names:
            name = part_name(stem, secrets.token_hex(4), extension)
        self._names.append(name)
        return name

    def _taken(self) -> set[str]:
        with self._before_commit():
            taken = set(call(os.listdir, "", self._lock.fd))
        return taken | files_of(self._old) if self._old is not None else taken

    def check_space(self, needed: int) -> None:
        """Raises OutOfSpaceError when fewer than ``needed`` bytes are free, also without what dead savers have left."""
        with self._before_commit():
            free = self._free_bytes()
            if free is not None and needed > free and not self._old_unreadable:
                # Safe before the commit: what is visible was made durable right after the lock (where that was asked for).
                named = files_of(self._old) if self._old is not None else frozenset()
                remove_dead_staging(self._lock.fd, host=self._host(), own_staging=None, named=named, durable=self._durable)
                free = self._free_bytes()
        if free is not None and needed > free:
            raise OutOfSpaceError(
                f"cannot save to {self.path}: needs {human_bytes(needed)}, {human_bytes(free)} free; {self._state()}"
            )

    def _host(self) -> str | None:
        """Whose dead savers are known to be dead; None where there is no lock."""
        return host_id() if self._lock.held else None

    def _is_dead(self, staging: str) -> bool:
        match = STAGING_PATTERN.fullmatch(staging)
        return match is not None and match[1] == self._host()

    def _free_bytes(self) -> int | None:
        """None where the file system does not know (ramfs, some network ones): it then says that it has no blocks at all."""
        there = call(os.fstatvfs, "", self._lock.fd)
        return there.f_bavail * there.f_frsize if there.f_blocks else None

    def create(self, name: str, length: int) -> StagedShard:
        """Makes the staged file of shard ``name``, ``length`` bytes long and reserved where the file system can."""
        with self._before_commit():
            self._staging.make(self._lock.fd)
            self._staged.append(name)
            return self._staging.create(name, length)

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Ends a shard whose data is written, with its true length and its header, and closes it."""
        with self._before_commit():
            self._staging.seal(shard, length, header)

    def stage(self, name: str, data: bytes) -> None:
        """Makes a part of the checkpoint that is ``data`` and nothing else."""
        with self._before_commit():
            self._staging.make(self._lock.fd)
            self._staged.append(name)
            self._staging.write(name, data)

    def add_companions(self, companions: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Stages files that are to lie beside the weights; what the index says of them."""
        with self._before_commit():
            return self._companions.add(companions, self._lock.fd)

    def add_second_name(self, shard: str, name: str) -> None:
        """Stages ``name``, a companion's, for the content of the sealed ``shard``."""
        with self._before_commit():
            self._companions.add_second_name(shard, name, self._lock.fd)

    def commit(self, index: Index) -> CommitOutcome:
        """Makes the sealed shards and ``index`` the checkpoint of the directory.

        Raises SaveNotCommittedError, OutOfSpaceError, DirectoryBusyError when nothing was committed, and
        DurabilityUncertainError when the new checkpoint is in place but perhaps not for good.
        """
        encoded = encode_index(index)
        try:
            self._move_all()
            self._publish(encoded)
        except BaseException as error:
            self._settle(encoded, error)
        self._settled = True
        return self._clean(index)

    def _move_all(self) -> None:
        """Gives the shards their final names, after writing down which these are and what the commit will replace."""
        self._staging.make(self._lock.fd)
        replaced = files_of(self._old) if self._old is not None else ()
        self._staging.write(LIST_NAME, json.dumps([*self._names, *sorted(replaced)]).encode())
        self._staging.sync()
        for name in self._staged:
            self._moving.append(name)
            self._move(name)
        self._companions.link_free(self._lock.fd)
        self._sync(self._lock.fd, "")

    def _move(self, name: str) -> None:
        """By link(2), which unlike rename(2) never replaces: what others made under this name meanwhile is theirs.

        The staged name goes with its directory. Where there are no links, a name that is taken is looked for first.
        """
        try:
            return self._staging.link(name, self._lock.fd)
        except CallFailed as error:
            if error.errno not in (errno.EEXIST, *NO_LINKS):
                raise
        there = inode_of(name, self._lock.fd)
        if there is None:
            self._staging.rename(name, name, self._lock.fd)
        elif there != self._staging.inode_of(name):  # NFS may say so of a link that it has just made
            self._moving.remove(name)
            raise DirectoryBusyError(
                f"cannot save to {self.path}: {name} was expected to be free, someone made a file of that name meanwhile, "
                f"which is as it was; {self._state()}"
            )

    def _publish(self, index: bytes) -> None:
        self._staging.write(NEW_INDEX_NAME, index)
        if read_all(INDEX_NAME, self._lock.fd, MAX_INDEX_BYTES) != self._old_bytes:
            raise DirectoryBusyError(
                f"cannot save to {self.path}: {INDEX_NAME} was expected to stay as it was, another host replaced it; "
                f"nothing was committed, the other checkpoint is intact"
            )
        with self._before_commit():
            if not self._lock.is_still(self.path):
                raise SaveNotCommittedError(
                    f"cannot save to {self.path}: the directory was expected to stay where it is, it was moved, replaced or removed "
                    f"during the save; nothing was committed, what was in it is as it was"
                )
        self._attempted = True
        self._staging.rename(NEW_INDEX_NAME, INDEX_NAME, self._lock.fd)
        self._sync(self._lock.fd, "")
        self._committed = True
        # Only now: a loss of power must not leave the old weights beside a new config.
        for name in self._companions.replacing():
            self._staging.rename(name, name, self._lock.fd)
        if self._companions.replacing():
            self._sync(self._lock.fd, "")

    def _settle(self, index: bytes, error: BaseException) -> None:
        """Finds out what a failed or interrupted commit has become, and raises what is true of it."""
        if not self._attempted:
            self.close()
            with self._before_commit():
                raise error
        self._settled = True
        try:
            found = read_all(INDEX_NAME, self._lock.fd, MAX_INDEX_BYTES)
        except CallFailed as unreadable:
            raise DurabilityUncertainError(
                f"cannot tell whether the save was committed: {self.path}: {_words(error)}, then the index "
                f"could not be read: {_words(unreadable)}; nothing was removed, the old or the new checkpoint is there"
            ) from error
        if found == self._old_bytes and found != index:
            self._settled = False
            self.close()
            with self._before_commit():
                raise error
        if not isinstance(error, CallFailed):
            raise error
        if self._committed:
            uncertain = " and ".join(self._companions.replacing())
            raise DurabilityUncertainError(
                f"saved, but {uncertain} may still be of the previous checkpoint: {self.path}: {_words(error)}, "
                f"once the new weights were in place for good; the next save finishes this, until then readers are told"
            ) from error
        raise DurabilityUncertainError(
            f"saved, but not known to be durable: {self.path}: {_words(error)}, once the index had been renamed; "
            f"the new checkpoint is in place, a loss of power may bring back the previous one; nothing was removed"
        ) from error

    def _clean(self, new: Index) -> CommitOutcome:
        notes = [] if self._lock.held else ["the file system has no locks: savers are not ordered"]
        if self._old_unreadable:
            notes.append(f"nothing was removed, since the replaced index cannot be read ({self._old_unreadable})")
        record = self._old.record if self._old is not None else None
        if self.supersedes is not None and (record is None or record.supersedes != self.supersedes):
            notes.append(f"{LONE_NAME}, which was not saved by shardsave, was replaced")
        elif self._old is not None and record is None:
            notes.append("the checkpoint that was replaced was not saved by shardsave")
        assert self._staging.name is not None
        leftovers: list[str] = []
        if others := staging_of_others(self._lock.fd, self._host(), self._staging.name, leftovers):
            notes.append(
                f"{count(len(others), 'leaving')} of saves on other hosts, which may still be at work, stay: {some(others)} "
                f"(once they are not: shardsave clean {shlex.quote(self.path)} --other-hosts)"
            )
        leftovers += clean(
            self._lock.fd,
            own_staging=self._staging.name,
            host=self._host(),
            old=self._old,
            new=new,
            keep_all=bool(self._old_unreadable),
            durable=self._durable,
        )
        return CommitOutcome(tuple(dict.fromkeys(leftovers)), tuple(notes))

    def close(self) -> None:
        """Ends the transaction: removes what is not committed, frees the lock. May be called any number of times."""
        if self._lock.inherited:
            return
        with contextlib.ExitStack() as ending:  # an interrupt in the middle leaves litter for the next save, never a lock
            ending.callback(self._lock.close)
            ending.callback(self._staging.close)
            self._abandon()

    def _abandon(self) -> None:
        self._staging.abandon()
        if self._lock.fd >= 0 and not self._settled and self._staging.name is not None:
            named = files_of(self._old) if self._old is not None else frozenset()
            finals, named = self._moving, named - self._companions.linked
            remove_staging(self._lock.fd, self._staging.name, finals=finals, named=named, durable=self._durable)

    def _sync(self, fd: int, name: str) -> None:
        sync_file(fd, name, wanted=self._durable)

    def failure(self, call: str, name: str, number: int, reason: str, needed: int | None) -> ShardSaveError:
        """The error for a call that failed before the commit, of the class that its error number asks for."""
        room = ""
        if number in _NO_ROOM and self._lock.fd >= 0:
            wanted = f"needs {human_bytes(needed)}, " if needed is not None else ""
            with contextlib.suppress(CallFailed):
                free = self._free_bytes()
                room = f" ({wanted}{human_bytes(free)} free)" if free is not None else ""
        kind = OutOfSpaceError if number in (*_NO_ROOM, errno.ENOMEM) else SaveNotCommittedError
        reason = reason or os.strerror(number)
        what = f"cannot write {os.path.join(self.path, name)}" if name else f"cannot save to {self.path}"
        return kind(f"{what}: {call}: {reason}{room}; {self._state()}")

    def _state(self) -> str:
        if not self._looked:
            return "nothing was written, what was there is as it was"
        if self._old_bytes is None and self.supersedes is None:
            return "nothing was committed, there was no checkpoint before"
        return "nothing was committed, the previous checkpoint is intact"


def _current_directory(path: str) -> str:
    """Where the relative ``path`` begins."""
    try:
        return call(os.getcwd, "")
    except CallFailed as error:
        raise SaveNotCommittedError(
            f"cannot save to {path}: a path from the current directory was given, that is not there any more: {_words(error)}; "
            f"nothing was written"
        ) from error


def _words(error: BaseException) -> str:
    if not isinstance(error, CallFailed):
        return type(error).__name__
    about = f" of {error.path}" if error.path else ""
    return f"{error.call}{about}: {error.strerror}"
