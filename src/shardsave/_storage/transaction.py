"""One save's transaction on a directory: stage files, give them their final names, commit by one rename, clean.

Until the index is renamed, no file is touched that an index names. Once the rename has been attempted, no file is deleted until the
index has been re-read to learn which checkpoint is in place. `shardsave._storage.phase` has the phases in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

from shardsave._common.os_calls import OUT_OF_SPACE, CallFailed
from shardsave._common.shutdown import raise_if_ending
from shardsave._common.words import human_bytes, some
from shardsave._format.file_names import DIRECTORY_PATTERN, INDEX_NAME, LONE_NAME
from shardsave._format.index import MAX_INDEX_BYTES, FileRecord, Index, Superseded, encode_index
from shardsave._storage.cleaning_notes import cleaning_notes, cleaning_warnings
from shardsave._storage.cleanup import Cleaner, final_names
from shardsave._storage.commit_errors import (
    commit_unknown,
    companions_unknown,
    directory_moved,
    durability_unknown,
    index_replaced,
    save_failed,
    still_read,
)
from shardsave._storage.companions import StagedCompanions, finish_dead_savers
from shardsave._storage.directory import make_folders, names_on_the_way, path_to_write
from shardsave._storage.earlier import EarlierCheckpoint, EarlierShard, open_earlier, refusal
from shardsave._storage.final_names import FinalNames
from shardsave._storage.freeing import RemovedFiles, wait_until_freed
from shardsave._storage.joined import Invitation
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.phase import Phase
from shardsave._storage.previous import Previous, permissions_replaced, read_previous
from shardsave._storage.staging import NEW_INDEX_NAME, StagedShard, Staging
from shardsave._storage.taking_over import TakingOver
from shardsave.errors import OutOfSpaceError, SaveNotCommittedError, ShardSaveError

#: How often the removal of a staging directory is tried if other processes write there, and the pause after each, in seconds.
_REMOVALS, _REMOVAL_PAUSE = 20, 0.01


_OVERTAKEN = (
    "another save into this directory was committed while this one waited for its lock: what it saved has been replaced"
)


class CommitOutcome(NamedTuple):
    """``removed``: names of files that were removed or replaced, and that this save did not make. ``leftovers``: names that should
    have been removed and could not be. ``notes``: for the reader of the report. ``warnings``: what the caller must not overlook."""

    removed: tuple[str, ...]
    leftovers: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


class Transaction:
    """One save into one directory. Entering takes the lock; leaving without a commit removes all that was written.

    For one thread. In a forked child it does nothing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        durable: bool,
        lock_timeout: float,
        waiting: Callable[[], object] = raise_if_ending,
    ) -> None:
        """``waiting`` is called again and again while another saver has the lock; what it raises ends the save."""
        self.path = path_to_write(os.fspath(directory))
        self._lock_timeout = lock_timeout
        self._waiting = waiting
        self._folder = LockedDirectory(self.path, durable=durable)
        self._staging = Staging(self._folder, self.path)
        self._names = FinalNames(self._folder, self._staging, self.path)
        self._taking_over = TakingOver(self._staging)
        self._companions = StagedCompanions(self._folder, self._staging)
        self._previous = Previous()
        self._phase = Phase.UNREAD
        self._finished: list[str] = []  # companions of a dead saver that were put in place
        self._removed: list[str] = []  # leavings of dead savers that were removed before the commit
        self._overtaken = False  # whether another save was committed while this one waited for the lock
        self._invited = False  # whether other processes may create files in the staging directory

    @property
    def supersedes(self) -> Superseded | None:
        """The lone file that this save replaces."""
        return self._previous.lone

    def __enter__(self) -> Transaction:
        """Creates and locks the directory, and makes the checkpoint that is visible in it durable.

        Waits up to ``lock_timeout`` seconds for other savers. Raises DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError.
        """
        try:
            self._lock()
            self._read_previous()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        for tries_left in (1, 0):
            try:
                make_folders(self.path, self._folder.durable)
                return self._folder.acquire(self._lock_timeout, waiting=self._waiting)
            except CallFailed as error:
                # `clean` or a manager may just have removed the new directory of a step, which was empty, before it was locked.
                if error.errno == errno.ENOENT and tries_left:
                    continue
                kind = OutOfSpaceError if error.errno in OUT_OF_SPACE else SaveNotCommittedError
                raise kind(f"cannot save to {self.path}: {error.words}; nothing was written") from error

    def _read_previous(self) -> None:
        """Makes the previous commit durable before this save relies on it, whoever made it; then reads it, and finishes its companions."""
        with self._before_commit():
            if self._folder.names():  # otherwise there is nothing that this save could rely on, or remove
                self._folder.sync_with(INDEX_NAME)
            if self._folder.shared or self._folder.sticky:
                self._staging.private = self._folder.shared
                self._staging.make()
                self._folder.learn_owner(self._staging.directory)
            self._previous = read_previous(self._folder)
            self._overtaken = self._folder.was_overtaken()
            self._phase = self._phase.then(Phase.STAGING)
            self._folder.check_replaceable(INDEX_NAME)
            self._staging.permissions = permissions_replaced(self._folder, self._previous)
            self._finished = finish_dead_savers(self._folder, self._previous.companions, self._folder.knows_dead)

    def earlier(self, path: str | None) -> EarlierCheckpoint | str:
        """The checkpoint in the directory ``path`` (None: the one that is replaced), or why none of its shards can be taken over."""
        if path is not None:
            with self._before_commit():
                found = open_earlier(path, self._folder, self._staging)
            if found is not None:
                return found
        if self._previous.index is None:
            return self._previous.unreadable or "there is no checkpoint with an index"
        problem = refusal(self._previous.index)
        return problem or EarlierCheckpoint(self._folder, self._previous.index, self.path, closes=False)

    def take_over(self, name: str, earlier: EarlierCheckpoint, shard: EarlierShard) -> tuple[int, ...] | None:
        """Stages ``shard`` of ``earlier`` as the shard ``name``, without writing it. Returns the identity of its file.

        None: it has to be written.
        """
        with self._before_commit():
            self._staging.make()
            identity = self._taking_over.take(name, earlier, shard)
        if identity is not None:
            self._names.add(name)
        return identity

    def drop(self, name: str) -> None:
        """Undoes `take_over`: the shard has to be written."""
        with self._before_commit():
            self._names.drop(name)
            self._staging.directory.unlink(name)

    def shard_names(self, count: int) -> tuple[str, ...]:
        """Names for ``count`` shards, none of which is taken in the directory."""
        return self._names.choose_shards(count, self._taken_names())

    def part_name(self, stem: str, extension: str) -> str:
        """A new name for a part, not taken in the directory."""
        return self._names.choose_part(stem, extension, self._taken_names())

    def directory_name(self, stem: str) -> str:
        """A new name for the directory of a part, not taken in the directory."""
        return self._names.choose_directory(stem, self._taken_names())

    def _taken_names(self) -> set[str]:
        with self._before_commit():
            return {*self._folder.names(), *self._previous.files}

    def check_not_read(self, files: Mapping[str, str]) -> None:
        """Raises SaveNotCommittedError if this save would remove one of ``files`` (path → the tensor that the model reads from it)."""
        doomed = {*final_names(self._previous.files, (), frozenset()), LONE_NAME}
        for path, tensor in files.items():
            with self._before_commit():
                found = doomed.intersection(names_on_the_way(self._folder, path))
            if found:
                raise still_read(self.path, min(found), tensor, self._state())

    def check_space(self, needed: int) -> None:
        """Raises OutOfSpaceError if fewer than ``needed`` bytes are free, even after the files of dead savers were removed.

        Waits until the space of files that earlier saves of this process removed is free; quotas count it too.
        """
        wait_until_freed()
        with self._before_commit():
            free = self._folder.free_bytes()
            if free is not None and needed > free and not self._previous.unreadable:
                # Allowed before the commit: the visible checkpoint was made durable right after the lock (if that was requested).
                cleaner = Cleaner(self._folder, self._staging.name)
                cleaner.remove_dead_staging(self._previous.files)
                self._removed = list(cleaner.removed)
                free = self._folder.free_bytes()
        if free is not None and needed > free:
            room = f"needs {human_bytes(needed)}, {human_bytes(free)} free"
            raise OutOfSpaceError(f"cannot save to {self.path}: {room}; {self._state()}")

    def make_directory(self, name: str) -> None:
        """Creates the staged directory ``name`` of a part. Its files are staged as ``name/…``, and the commit moves them with it."""
        assert DIRECTORY_PATTERN.fullmatch(name)
        with self._before_commit():
            self._staging.make()
            self._names.add_directory(name)
            self._staging.make_folder(name)

    def create(self, name: str, length: int) -> StagedShard:
        """Creates the staged file of shard ``name`` with room for ``length`` bytes, reserved on disk if the file system supports that."""
        with self._before_commit():
            self._stage(name)
            return self._staging.create(name, length)

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Finishes a shard whose data is written: sets its true length, writes its header."""
        with self._before_commit():
            self._staging.seal(shard, length, header)

    def sync_sealed(self) -> None:
        """Syncs and closes the shards that are sealed."""
        with self._before_commit():
            self._staging.sync_files()

    def invite(self, names: Iterable[str]) -> Invitation:
        """Lets other processes create the shards ``names`` in the staging directory; the commit moves them as if this one had."""
        with self._before_commit():
            for name in names:
                self._stage(name)
            self._staging.make()
            self._invited = True
            nonce = self._staging.write_nonce()
        return Invitation(self._staging.name, nonce, self._staging.private, self._staging.permissions, self._state())

    def stage(self, name: str, data: bytes) -> None:
        """Creates the staged file ``name``, a part of the checkpoint, with the content ``data``."""
        with self._before_commit():
            self._stage(name)
            self._staging.write(name, data)

    def _stage(self, name: str) -> None:
        self._staging.make()
        self._names.add(name)

    def add_companions(self, companions: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Stages companions (name → content). Returns their records for the index."""
        with self._before_commit():
            return self._companions.add(companions)

    def add_second_name(self, shard: str, name: str) -> None:
        """Stages ``name``, a companion's, as a second name of the sealed ``shard``."""
        with self._before_commit():
            self._companions.add_second_name(shard, name)

    def commit(self, index: Index, attempt: Callable[[], object]) -> CommitOutcome:
        """Makes the sealed shards and ``index`` the checkpoint of the directory.

        ``attempt`` is called right before the rename of the index; what it raises ends the save, and nothing is committed.
        Raises SaveNotCommittedError, OutOfSpaceError, DirectoryBusyError when nothing was committed, and
        DurabilityUncertainError when the new checkpoint is in place but may not survive a loss of power.
        """
        encoded = encode_index(index)
        try:
            self._finish_staging(encoded)
            self._move_all()
            self._publish(attempt)
            self._replace_companions()
        except BaseException as error:
            self._settle(encoded, error)
            raise
        return self._clean(index)

    def _finish_staging(self, index: bytes) -> None:
        """Stages the index, and the list of the final names and of those that are replaced; makes all that is staged durable, at once."""
        self._staging.make()
        self._staging.write_list([*self._names.chosen, *sorted(self._previous.files)])
        self._staging.write_index(index)
        self._staging.sync()

    def _move_all(self) -> None:
        """Gives the shards and the directories of parts their final names, once the list of these is durable, and where it is."""
        self._names.give_all(self._state())
        self._companions.link_free()
        self._folder.sync()

    def _publish(self, attempt: Callable[[], object]) -> None:
        """Renames the index, unless another host has replaced it or the directory was moved since this save began."""
        if self._folder.read_all(INDEX_NAME, MAX_INDEX_BYTES) != self._previous.index_bytes:
            raise index_replaced(self.path)
        with self._before_commit():
            if not self._folder.is_in_place():
                raise directory_moved(self.path)
        attempt()
        self._phase = self._phase.then(Phase.RENAMING)
        self._staging.rename(NEW_INDEX_NAME, INDEX_NAME)
        self._folder.sync()
        self._phase = self._phase.then(Phase.COMMITTED)

    def _replace_companions(self) -> None:
        """Renames companions that replace files. Only after the commit: a loss of power must not leave old weights beside a new config."""
        for name in self._companions.replacing():
            self._staging.rename(name, name)
        if self._companions.replacing():
            self._folder.sync()

    def _settle(self, index: bytes, error: BaseException) -> None:
        """Decides whether an interrupted commit took effect; raises the error that describes the result, if ``error`` does not."""
        if self._phase is Phase.RENAMING:
            try:
                current = self._folder.read_all(INDEX_NAME, MAX_INDEX_BYTES)
            except CallFailed as unreadable:
                raise commit_unknown(self.path, error, unreadable) from error
            if current == self._previous.index_bytes and current != index:
                self._phase = self._phase.then(Phase.NOT_COMMITTED)
        if self._phase.removable:
            self.close()
        if not isinstance(error, CallFailed):
            return
        if self._phase.removable:
            raise self.failure(error) from error
        if self._phase is Phase.COMMITTED:
            raise companions_unknown(self.path, error, self._companions.replacing()) from error
        raise durability_unknown(self.path, error) from error

    def _clean(self, new: Index) -> CommitOutcome:
        to_free = RemovedFiles()
        cleaner = Cleaner(self._folder, self._staging.name, to_free)
        try:
            cleaner.after_commit(self._previous, new)
        finally:
            to_free.free_later()
        replaced = self._companions.replacing()
        notes = [] if self._folder.exclusive else ["the file system has no locks: simultaneous saves are not kept apart"]
        notes += [_OVERTAKEN] if self._overtaken else []
        notes += self._previous.notes(cleaner.removed)
        links = (self._previous.links | self._companions.links) - {LONE_NAME}
        notes += cleaning_notes(self.path, cleaner, links, self._finished)
        index = [INDEX_NAME] if self._previous.others_index else []
        removed = dict.fromkeys([*self._removed, *cleaner.removed, *replaced, *index])
        warnings = cleaning_warnings(self.path, cleaner)
        return CommitOutcome(tuple(removed), tuple(cleaner.leftovers), tuple(notes), tuple(warnings))

    def close(self) -> None:
        """Ends the transaction: removes files that belong to no checkpoint, frees the lock. May be called any number of times."""
        if self._folder.inherited:
            return
        with contextlib.ExitStack() as ending:  # an interrupt may leave files for the next save to remove, never a lock
            ending.callback(self._folder.close)
            ending.callback(self._staging.close)
            self._staging.abandon()
            if self._folder.fd >= 0 and self._phase.removable and self._staging.name:
                self._remove_staging(self._previous.files - self._companions.linked)

    def _remove_staging(self, named: frozenset[str]) -> None:
        """Removes the staging directory. An invited process may put files into it until it is gone: so this is tried again."""
        for tries_left in reversed(range(_REMOVALS if self._invited else 1)):
            cleaner = Cleaner(self._folder, self._staging.name)
            cleaner.remove_staging(self._staging.name, named, finals=self._names.given)
            if not cleaner.failed or not tries_left:
                return
            time.sleep(_REMOVAL_PAUSE)

    @contextlib.contextmanager
    def _before_commit(self) -> Iterator[None]:
        """Raises the error for an OS call that fails in the block: nothing was committed."""
        assert self._phase <= Phase.STAGING
        try:
            yield
        except CallFailed as error:
            raise self.failure(error) from error

    def failure(self, error: CallFailed, needed: int | None = None) -> ShardSaveError:
        """The error for a call that failed before the commit; its errno decides between OutOfSpaceError and SaveNotCommittedError.

        ``needed``: the bytes that all shards need, if the call was about that.
        """
        return save_failed(self._folder, self.path, error, needed, self._state())

    def _state(self) -> str:
        if self._phase is Phase.UNREAD:
            return "nothing was written, existing files are unchanged"
        gone = f", and what dead savers left was removed: {some(self._removed)}" if self._removed else ""
        if self._previous.not_ours is not None:
            return f"nothing was committed, all other files are unchanged{gone}"
        if not self._previous.exists:
            return f"nothing was committed, the directory had no checkpoint before{gone}"
        return f"nothing was committed, the previous checkpoint is intact{gone}"
