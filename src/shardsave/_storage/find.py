"""From a path to the files that lie there: an index, a lone file, or both. Only regular files are ever opened."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed, Descriptor, call, kind_of
from shardsave._common.words import some
from shardsave._format.file_names import INDEX_NAME, LONE_NAME, TORCH_ENDINGS
from shardsave._format.index import MAX_INDEX_BYTES
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, ShardSaveError

#: What becomes of files of torch.save: what unpickles them runs whatever code they hold.
TORCH_SAVE_HINT = "no pickle is read here, since that can run code: shardsave convert SRC DST makes a checkpoint of it"

#: `.ckpt` is only a hint: directories often have such names, too.
_TORCH_SAVE_ENDINGS = (*TORCH_ENDINGS, ".ckpt")

#: How many names a hint lists.
_HINTED = 3

#: What a call says when nothing is there; a link that leads to itself is nothing either.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Found(NamedTuple):
    """What a path leads to: an index, a lone file, or both."""

    folder: str
    index_name: str
    index_bytes: bytes | None
    lone: str | None


def find(path: str) -> Found:
    """What lies at ``path``, a directory, an index or one file. Raises CheckpointNotFoundError, CorruptCheckpointError."""
    try:
        is_folder = stat.S_ISDIR(call(os.stat, path, path).st_mode)
    except CallFailed as error:
        if error.errno not in _ABSENT:
            raise cannot_read(path, error) from error
        raise CheckpointNotFoundError(f"no checkpoint at {path}: {error.strerror}") from error
    folder, name = (path, INDEX_NAME) if is_folder else os.path.split(path)
    if not is_folder and not name.endswith(".index.json"):
        return Found(folder or ".", INDEX_NAME, None, name)
    index_bytes = _read_index(os.path.join(folder, name), name)
    lone = LONE_NAME if is_folder and _is_there(os.path.join(path, LONE_NAME), even_broken=index_bytes is None) else None
    if index_bytes is None and lone is None:
        index_bytes = _read_index(os.path.join(folder, name), name)  # a save has put it in the place of the lone file just now
    if index_bytes is None and lone is None:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: neither {name} nor {LONE_NAME} is there{_hint(folder)}")
    return Found(folder or ".", name, index_bytes, lone)


def _is_there(path: str, even_broken: bool) -> bool:
    """Whether ``path`` leads to something; a link to nothing counts when nothing else is there to be read."""
    try:
        call(os.stat, path, path, follow_symlinks=not even_broken)
    except CallFailed as error:
        if error.errno not in _ABSENT:
            raise cannot_read(path, error) from error
        return False
    return True


def _hint(folder: str) -> str:
    try:
        listed = os.listdir(folder or ".")
    except OSError:
        return ""
    others = sorted(name for name in listed if name.endswith((".safetensors", ".safetensors.index.json")))
    if others:
        return f"; to read another file, give its path: {some(others, _HINTED)}"
    if any(name.endswith(".distcp") for name in listed):
        return f"; it holds a distributed checkpoint, and {TORCH_SAVE_HINT}"
    pickled = sorted(name for name in listed if name.endswith(_TORCH_SAVE_ENDINGS))
    return f"; {pickled[0]} has the name of a file of torch.save, and {TORCH_SAVE_HINT}" if pickled else ""


def _read_index(path: str, name: str) -> bytes | None:
    file = open_regular(path, f"index {name}")
    if file is None:
        if os.path.islink(path):
            raise CorruptCheckpointError(
                f"corrupt index {name}: {path}: a regular file was expected, it is a link to nothing; "
                f"the checkpoint was copied or downloaded in part"
            )
        return None
    try:
        with file:
            length, done = call(os.fstat, path, file.fd).st_size, 0
            parts = []
            while length <= MAX_INDEX_BYTES and (part := call(os.read, path, file.fd, 1 << 20)):
                parts.append(part)
                done += len(part)
                length = max(length, done)  # some files say 0 and have no end
    except CallFailed as error:
        raise cannot_read(path, error) from error
    if length > MAX_INDEX_BYTES:
        raise CorruptCheckpointError(
            f"corrupt index {name}: at most {MAX_INDEX_BYTES} bytes expected, it has {length}; no shard was opened"
        )
    return b"".join(parts)


def open_regular(path: str, what: str) -> Descriptor | None:
    """Opens a regular file for reading, through symbolic links; None if there is none.

    Nothing else is even opened: that alone can make a device act, or wake the writer of a FIFO.
    """
    file = Descriptor()
    try:
        _refuse_unless_regular(call(os.stat, path, path).st_mode, path, what)
        file.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        _refuse_unless_regular(call(os.fstat, path, file.fd).st_mode, path, what)  # it may have been replaced in between
    except CallFailed as error:
        file.abandon()
        if error.errno == errno.ELOOP:
            raise CorruptCheckpointError(
                f"corrupt {what}: {path}: a regular file was expected, it is a link that leads to itself; it was not read"
            ) from error
        if error.errno in _ABSENT:
            return None
        raise cannot_read(path, error) from error
    except BaseException:
        file.abandon()
        raise
    return file


def _refuse_unless_regular(mode: int, path: str, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise CorruptCheckpointError(
            f"corrupt {what}: {path}: a regular file was expected, it is a {kind_of(mode)}; it was not read"
        )


def cannot_read(path: str, error: CallFailed) -> ShardSaveError:
    """The error for a call that failed on a file which is there."""
    return ShardSaveError(f"cannot read {path}: {error.call}: {error.strerror}; the files on disk are as they were")
