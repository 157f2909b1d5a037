"""A shared lock on a step that is read: a removal needs the whole lock of its directory, so it leaves the step for later."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed
from shardsave._common.shutdown import raise_if_ending
from shardsave._storage.find import cannot_read
from shardsave._storage.lock import NO_LOCKS
from shardsave.errors import CheckpointNotFoundError, DirectoryBusyError

_POLL_SECONDS = 0.05

#: How long a reader waits for a save or a removal in the step's directory, in seconds.
_PATIENCE = 60.0


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Keeps the step at ``path`` from being removed while the block runs, by any process of this host that asks for its lock.

    Raises CheckpointNotFoundError, DirectoryBusyError, ShardSaveError.
    """
    with Descriptor() as folder:
        try:
            folder.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except CallFailed as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise cannot_read(path, error) from error
            raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error
        _share(folder, path)
        yield


def _share(folder: Descriptor, path: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        raise_if_ending()
        try:
            return fcntl.flock(folder.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return
            if error.errno != errno.EWOULDBLOCK:
                raise cannot_read(path, CallFailed("flock", path, error.errno or 0, error.strerror or "")) from error
        if time.monotonic() >= deadline:
            raise DirectoryBusyError(
                f"cannot read {path}: a shared lock was expected within {_PATIENCE:g} s, a save or a removal holds it; nothing was read"
            )
        time.sleep(_POLL_SECONDS)
