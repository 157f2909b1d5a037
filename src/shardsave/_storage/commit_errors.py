"""The errors of a commit. Each message says in which state the directory is now."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from shardsave._common.os_calls import DISK_FULL, OUT_OF_SPACE, CallFailed
from shardsave._common.words import human_bytes
from shardsave._format.file_names import INDEX_NAME
from shardsave._storage.directory import Directory
from shardsave.errors import (
    DirectoryBusyError,
    DurabilityUncertainError,
    OutOfSpaceError,
    SaveNotCommittedError,
    ShardSaveError,
)


def save_failed(folder: Directory, path: str, error: CallFailed, needed: int | None, state: str) -> ShardSaveError:
    """The error for a call that failed before the commit of a save into ``folder``, whose path is ``path``.

    ``needed``: the bytes that all shards need, if the call was about that. ``state``: that of the directory now.
    """
    room = ""
    if error.errno in DISK_FULL and folder.fd >= 0:
        need = f"needs {human_bytes(needed)}, " if needed is not None else ""
        with contextlib.suppress(CallFailed):
            free = folder.free_bytes()
            room = f" ({need}{human_bytes(free)} free)" if free is not None else ""
    kind = OutOfSpaceError if error.errno in OUT_OF_SPACE else SaveNotCommittedError
    what = f"cannot write {os.path.join(path, error.path)}" if error.path else f"cannot save to {path}"
    return kind(f"{what}: {error.reason}{room}; {state}")


def name_taken(path: str, name: str, state: str) -> DirectoryBusyError:
    """Another program created the file ``name`` during the save."""
    return DirectoryBusyError(
        f"cannot save to {path}: {name} was expected to be free, someone made a file of that name meanwhile, "
        f"which is unchanged; {state}"
    )


def index_replaced(path: str) -> DirectoryBusyError:
    """A saver of another host, or another program, which our lock does not keep out, made an index during the save."""
    return DirectoryBusyError(
        f"cannot save to {path}: {INDEX_NAME} was expected to stay as it was, another host or program replaced it during the save; "
        f"nothing was committed, the index that is there now was not touched"
    )


def directory_moved(path: str) -> SaveNotCommittedError:
    """The path does not lead to the locked directory any more."""
    return SaveNotCommittedError(
        f"cannot save to {path}: the directory was expected to stay where it is, it was moved, replaced or removed "
        f"during the save; nothing was committed, its files are unchanged"
    )


def commit_unknown(path: str, error: BaseException, unreadable: CallFailed) -> DurabilityUncertainError:
    """``error`` was raised during or after the rename of the index, and then the index could not be re-read."""
    cause = error.words if isinstance(error, CallFailed) else type(error).__name__
    return DurabilityUncertainError(
        f"cannot tell whether the save was committed: {path}: {cause}, then the index "
        f"could not be read: {unreadable.words}; nothing was removed, the old or the new checkpoint is in place"
    )


def durability_unknown(path: str, error: CallFailed) -> DurabilityUncertainError:
    """The new index is in place, but the fsync of its name failed."""
    return DurabilityUncertainError(
        f"saved, but not known to be durable: {path}: {error.words}, after the rename of the index; "
        f"the new checkpoint is in place, a loss of power may bring back the previous one; nothing was removed"
    )


def rank_lost_after_commit(path: str, error: ShardSaveError) -> DurabilityUncertainError:
    """Another rank was lost once the index had been renamed."""
    return DurabilityUncertainError(
        f"saved, but not all ranks were told: {path}: {error}, after the rename of the index; the new checkpoint is in place"
    )


def rank_lost_in_commit(path: str, error: ShardSaveError) -> DurabilityUncertainError:
    """The rank that renames the index was lost while it did so."""
    return DurabilityUncertainError(
        f"cannot tell whether the save was committed: {path}: {error}, when the index was to be renamed; the index that is there now is "
        f"not the new one; nothing was removed, the old or the new checkpoint is in place: `shardsave inspect` says which, by its step or "
        f"its time, and `shardsave verify` whether it is whole"
    )


def companions_unknown(path: str, error: CallFailed, names: Iterable[str]) -> DurabilityUncertainError:
    """The new checkpoint is durable, but not all of its companions replaced those of the previous one."""
    return DurabilityUncertainError(
        f"saved, but {' and '.join(names)} may still belong to the previous checkpoint: {path}: {error.words}, "
        f"after the new weights were committed; the next save completes this, until then reports name the difference"
    )


def still_read(path: str, name: str, tensor: str, state: str) -> SaveNotCommittedError:
    """The file ``name``, which the save would remove, holds ``tensor`` of the very model that is saved."""
    return SaveNotCommittedError(
        f"cannot save to {path}: a directory was expected that the model does not read from, accelerate reads {tensor!r} from {name} "
        f"there, which the save would remove; save to another directory; {state}"
    )
