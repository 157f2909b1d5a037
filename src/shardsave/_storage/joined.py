"""The staging directory of a save that another process leads: this process only creates and seals shards in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from errno import ENOENT
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed, call
from shardsave._format.file_names import INDEX_NAME
from shardsave._format.index import MAX_INDEX_BYTES
from shardsave._storage.commit_errors import save_failed
from shardsave._storage.directory import Directory, path_to_write
from shardsave._storage.permissions import Permissions, Replaced
from shardsave._storage.staging import StagedShard, Staging
from shardsave.errors import SaveNotCommittedError, ShardSaveError

#: How often the staging directory is looked for, and the pause after each try, in seconds: a client of a network file system may believe
#: for a moment that a new name is not there.
_TRIES, _PAUSE = 6, 0.2


class Invitation(NamedTuple):
    """What a process needs to know to write into the staging directory ``staging`` of another one.

    ``nonce``: the content of the file in it that only this save knows. ``private``, ``permissions``: as in `Staging`. ``state``: what
    errors say about the state of the checkpoint's directory.
    """

    staging: str
    nonce: str
    private: bool
    permissions: Replaced
    state: str

    def encode(self) -> bytes:
        given = self.permissions
        kinds = (given.files, given.index, given.folder, given.in_folder)
        listed = [one and (one.mode, one.group, one.acl.hex() if one.acl is not None else None) for one in kinds]
        return json.dumps([self.staging, self.nonce, self.private, listed, self.state]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Invitation:
        staging, nonce, private, listed, state = json.loads(data)
        kinds = [one and Permissions(one[0], one[1], bytes.fromhex(one[2]) if one[2] is not None else None) for one in listed]
        return cls(staging, nonce, private, Replaced(*kinds), state)


class Joined:
    """Shards in the staging directory of another process's transaction, with the methods that `ShardWriter` needs of one.

    For one thread. Before `join` it only makes errors. In a forked child it does nothing.
    """

    def __init__(self, directory: str | os.PathLike[str], *, durable: bool) -> None:
        self.path = path_to_write(os.fspath(directory))
        self._folder = Directory(durable=durable)
        self._staging = Staging(self._folder, self.path)
        self._state = "nothing was written"

    def join(self, invitation: Invitation, leader: str, waiting: Callable[[], object]) -> None:
        """Opens the staging directory. ``leader``: the name of the process that made it, for messages. ``waiting`` is called before it
        is looked for again; what it raises is raised.

        Raises SaveNotCommittedError, OutOfSpaceError; also if the directory of the same path is another one here.
        """
        self._state = invitation.state
        self._staging.private, self._staging.permissions = invitation.private, invitation.permissions
        try:
            for _ in range(_TRIES):
                if self._found(invitation):
                    return
                self._staging.close()
                self._folder.close()
                time.sleep(_PAUSE)
                waiting()
        except CallFailed as error:
            raise self.failure(error) from error
        raise SaveNotCommittedError(
            f"cannot save to {self.path}: the directory of {leader} was expected, which has just made {invitation.staging} in it, that "
            f"is not here: it is not a shared directory; save into one that all ranks see, by the same path; {self._state}"
        )

    def _found(self, invitation: Invitation) -> bool:
        try:
            self._folder.open_for_writing(self.path)
        except CallFailed as error:
            if error.errno != ENOENT:
                raise
            call(os.listdir, "", os.path.dirname(self.path) or ".")  # makes a network file system look again
            return False
        return self._staging.join(invitation.staging, invitation.nonce)

    def is_in_index(self, shard: str) -> bool:
        """Whether the index that is in place is that of this save: it names ``shard``, which no earlier one does. Raises CallFailed."""
        return f'"{shard}"'.encode() in (self._folder.read_all(INDEX_NAME, MAX_INDEX_BYTES) or b"")

    def create(self, name: str, length: int) -> StagedShard:
        """Creates the staged file of shard ``name`` with room for ``length`` bytes, reserved on disk if the file system supports that."""
        try:
            return self._staging.create(name, length)
        except CallFailed as error:
            raise self.failure(error) from error

    def seal(self, shard: StagedShard, length: int, header: bytes) -> None:
        """Finishes a shard whose data is written: sets its true length, writes its header."""
        try:
            self._staging.seal(shard, length, header)
        except CallFailed as error:
            raise self.failure(error) from error

    def sync_sealed(self) -> None:
        """Syncs and closes the shards that are sealed."""
        try:
            self._staging.sync_files()
        except CallFailed as error:
            raise self.failure(error) from error

    def failure(self, error: CallFailed, needed: int | None = None) -> ShardSaveError:
        """The error for a call that failed; as in a transaction."""
        return save_failed(self._folder, self.path, error, needed, self._state)

    def close(self) -> None:
        """Closes what is open. The files stay: the process that leads removes or moves them. May be called any number of times."""
        self._staging.abandon()
        self._staging.close()
        self._folder.close()
