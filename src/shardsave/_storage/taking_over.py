"""Takes over a shard of an earlier checkpoint under a new name, without writing its bytes: by a clone, or by a hard link.

A clone (FICLONE, ioctl_ficlone(2)) is a file of its own that shares the disk space of the other one; only some file systems have them.
A hard link is the same file, so it also has the owner and the permissions of the earlier name. Where a new file would have others, there
is no link, since changing the file would change the earlier checkpoint. Nothing is copied: a copy would read and write what a save only
writes. What cannot be taken over is written anew, whatever the reason, so no failure of these calls ends a save, but for a failed fsync
and files of its own that cannot be made or removed.

The file that is taken over is only ever open for reading, and it is synced like a new one: nobody knows whether its saver did that.
Once is enough for a process, as long as nobody writes to the file: an fsync waits for the disk even if there is nothing to write. A clone
is a new file, and is synced with the others that are staged.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call
from shardsave._storage.earlier import EarlierCheckpoint, EarlierShard
from shardsave._storage.permissions import Access, access_of
from shardsave._storage.shard_files import file_identity
from shardsave._storage.staging import Staging

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)

#: The files (`file_identity`) that this process has synced, the last ones of them.
_synced: dict[tuple[int, ...], None] = {}
_MOST_REMEMBERED = 100_000


class TakingOver:
    """Takes over shards into ``staging``. Every method raises CallFailed."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._new: Access | None = None  # that of a new file, once the file system has refused to clone into one

    def take(self, name: str, earlier: EarlierCheckpoint, shard: EarlierShard) -> tuple[int, ...] | None:
        """Gives ``shard`` the staged name ``name``. Returns the identity of the file that has this name now; it is synced, or a clone.

        None: it has to be written, and ``name`` is free.
        """
        try:
            file = earlier.open(shard.name, shard.identity)
        except CallFailed:
            return None
        if file is None:
            return None
        with file:
            return self._clone(name, file, shard) or self._link(name, earlier, file, shard)

    def _clone(self, name: str, file: Descriptor, shard: EarlierShard) -> tuple[int, ...] | None:
        if self._new is not None:
            return None
        new = Descriptor()
        try:
            self._staging.create_empty(name, new)
            is_clone = True
            try:
                call(fcntl.ioctl, name, new.fd, _FICLONE, file.fd)
            except CallFailed:
                is_clone = False
            status = call(os.fstat, name, new.fd)
            if is_clone and status.st_size == shard.record.length:
                self._staging.sync_later(new, name)
                return file_identity(status)
            self._new = access_of(new.fd, name)
            new.close(name)
        except BaseException:
            new.abandon()
            raise
        self._staging.directory.unlink(name)
        return None

    def _link(self, name: str, earlier: EarlierCheckpoint, file: Descriptor, shard: EarlierShard) -> tuple[int, ...] | None:
        try:
            if access_of(file.fd, shard.name) != self._new:
                return None
        except CallFailed:
            return None
        self._sync(file, shard.identity, f"{earlier.path}/{shard.name}")
        with suppress(CallFailed):
            earlier.folder.link(shard.name, self._staging.directory, name)
        linked = self._staging.inode_of(name)  # also if the call failed: it may have taken effect
        if linked is None:
            return None
        if linked != shard.identity[:2]:  # the earlier name was given to another file meanwhile
            self._staging.directory.unlink(name)
            return None
        return shard.identity

    def _sync(self, file: Descriptor, identity: tuple[int, ...], path: str) -> None:
        """Makes the file durable, unless this process has done so and it is as it was then. Before it is linked, it has little to write."""
        if identity in _synced or not self._staging.directory.durable:
            return
        self._staging.directory.sync_open(file.fd, path)
        _synced[identity] = None
        if len(_synced) > _MOST_REMEMBERED:
            _synced.pop(next(iter(_synced)), None)
