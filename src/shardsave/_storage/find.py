"""From a path to the files of a checkpoint there: an index, a lone file, or both. Only regular files are ever opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor, open_regular
from shardsave._common.os_calls import CallFailed, NotRegular, TooLong, call, read_whole
from shardsave._common.words import count, some
from shardsave._format.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_NAME, LONE_NAME, TORCH_ENDINGS, step_number
from shardsave._format.index import MAX_INDEX_BYTES
from shardsave._format.other_kinds import START_BYTES, other_kind
from shardsave._format.rank_files import is_rank_file
from shardsave._storage.staging import owner_of
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError

#: The advice for a file of torch.save, which is not read: unpickling it runs whatever code it holds.
TORCH_SAVE_HINT = "no pickle is read here, since that can run code: shardsave convert SRC DST makes a checkpoint of it"

#: errno values of a path that leads to nothing, and of a symbolic link that leads to itself.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class FoundFiles(NamedTuple):
    """What a path leads to: an index (``index_bytes``), a lone file (its name in ``folder``), or both.

    ``ranks``: the names of files of several ranks in a directory, which are a checkpoint of their own.
    """

    folder: str
    index_name: str
    index_bytes: bytes | None
    lone: str | None
    ranks: tuple[str, ...] = ()


def find(path: str) -> FoundFiles:
    """Finds the checkpoint at ``path``: a directory, an index or one file. Raises CheckpointNotFoundError, CorruptCheckpointError."""
    try:
        is_folder = stat.S_ISDIR(call(os.stat, path, path).st_mode)
    except CallFailed as error:
        if error.errno not in _ABSENT:
            raise cannot_read(path, error) from error
        raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error
    folder, name = (path, INDEX_NAME) if is_folder else os.path.split(path)
    if not is_folder and not name.endswith(".index.json"):
        return FoundFiles(folder or ".", INDEX_NAME, None, name)
    index_bytes = _read_index(os.path.join(folder, name), name)
    lone = LONE_NAME if is_folder and _exists(os.path.join(path, LONE_NAME), even_broken=index_bytes is None) else None
    is_adapter = False
    if index_bytes is None and lone is None:
        is_adapter = is_folder and _has_adapter(path)
        index_bytes = _read_index(os.path.join(folder, name), name)  # a save may just have replaced the lone file by an index
    is_there = index_bytes is not None or lone is not None
    ranks = _rank_files(folder, may_be_hidden=is_there) if is_folder else ()
    if is_adapter and not is_there and not ranks:
        return FoundFiles(folder, name, None, ADAPTER_WEIGHTS)
    if not is_there and not ranks:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: neither {name} nor {LONE_NAME} is there{_hint(folder)}")
    return FoundFiles(folder or ".", name, index_bytes, lone, ranks)


def _has_adapter(folder: str) -> bool:
    """Whether PEFT has written an adapter into ``folder``: the files of one, and no save of ours that has not committed them."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= {*names} and not any(owner_of(name) for name in names)


def _rank_files(folder: str, *, may_be_hidden: bool) -> tuple[str, ...]:
    """The names of the files in ``folder`` that have the chunks of one rank each.

    ``may_be_hidden``: whether a folder that may not be listed counts as one without such files.
    """
    try:
        return tuple(sorted(filter(is_rank_file, call(os.listdir, folder, folder))))
    except CallFailed as error:
        if may_be_hidden and error.errno == errno.EACCES:
            return ()
        raise cannot_read(folder, error) from error


def _exists(path: str, even_broken: bool) -> bool:
    """Whether ``path`` leads to something. With ``even_broken``, a symbolic link to nothing counts as something."""
    try:
        call(os.stat, path, path, follow_symlinks=not even_broken)
    except CallFailed as error:
        if error.errno not in _ABSENT:
            raise cannot_read(path, error) from error
        return False
    return True


def _hint(folder: str) -> str:
    """Suggests what to try instead; it looks only at the names of the files in ``folder``."""
    try:
        listed = os.listdir(folder or ".")
    except OSError:
        return ""
    if latest := latest_step(folder, listed):
        return latest
    others = sorted(name for name in listed if name.endswith((".safetensors", ".safetensors.index.json")))
    if others:
        return f"; to read another file, give its path: {some(others)}"
    if any(name.endswith(".distcp") for name in listed):
        return f"; it holds a distributed checkpoint, and {TORCH_SAVE_HINT}"
    pickled = sorted(name for name in listed if name.endswith((*TORCH_ENDINGS, ".ckpt")))
    return f"; {pickled[0]} has the name of a file of torch.save, and {TORCH_SAVE_HINT}" if pickled else ""


def latest_step(folder: str, listed: Iterable[str]) -> str:
    """Names the latest step in ``folder``, for the end of a message, if one of the names that are ``listed`` is that of a step."""
    steps = sorted((number, name) for name in listed if (number := step_number(name)) is not None)
    committed = [name for _, name in steps if os.path.exists(os.path.join(folder, name, INDEX_NAME))]
    if not committed:
        return ""
    return f"; it is a run with {count(len(steps), 'step')}, the latest is {os.path.join(folder, committed[-1])}"


def _read_index(path: str, name: str) -> bytes | None:
    file = open_checkpoint_file(path, f"index {name}")
    if file is None:
        if os.path.islink(path):
            raise CorruptCheckpointError(
                f"corrupt index {name}: {path}: a regular file was expected, it is a link to nothing; "
                f"the checkpoint was copied or downloaded in part"
            )
        return None
    try:
        with file:
            data = read_whole(file.fd, path, MAX_INDEX_BYTES)
    except TooLong as error:
        raise CorruptCheckpointError(
            f"corrupt index {name}: at most {MAX_INDEX_BYTES} bytes expected, it has {error.length}; no shard was opened"
        ) from None
    except CallFailed as error:
        raise cannot_read(path, error) from error
    kind = other_kind(data[:START_BYTES])
    if kind is not None and kind.lost:
        refuse_other_kind(data[:START_BYTES], f"index {name}", path, "an index")
    return data


def open_checkpoint_file(path: str, what: str) -> Descriptor | None:
    """Opens a regular file for reading, through symbolic links; None if there is none.

    ``what`` names it in messages. Raises CorruptCheckpointError for anything but a regular file, without opening it.
    """
    try:
        return open_regular(path)
    except NotRegular as error:
        raise CorruptCheckpointError(f"corrupt {what}: {path}: {error.strerror}; it was not read") from error
    except CallFailed as error:
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(
                f"corrupt {what}: {path}: a regular file was expected, it is a link that leads to itself; it was not read"
            ) from error
        if error.errno in _ABSENT:  # also from fstat: a file system in user space may forget an open file that a save removes
            return None
        raise cannot_read(path, error) from error


def refuse_other_kind(start: bytes, what: str, path: str, expected: str) -> None:
    """Raises the error for a file that begins with ``start``, if that shows that it is something else than ``expected``."""
    kind = other_kind(start)
    if kind is not None and kind.lost:
        raise CorruptCheckpointError(f"corrupt {what}: {path}: {expected} was expected, it is {kind.words}; {kind.advice}")
    if kind is not None:
        raise IncompatibleCheckpointError(
            f"cannot read {path}: {expected} was expected, it is {kind.words}; {kind.advice}; the file is as it was"
        )


def cannot_read(path: str, error: CallFailed) -> ShardSaveError:
    """The error for a call that failed on an existing file."""
    return ShardSaveError(f"cannot read {path}: {error.reason}; the files on disk are as they were")
