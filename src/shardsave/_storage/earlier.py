"""The shards of an earlier checkpoint, which a save may take over: opened for reading alone, and checked against their index.

Only a durable checkpoint is read, and in a directory to which everybody may write only if its index is obeyed. A shard must be a regular
file: a symbolic link is never followed. Nothing is locked: a shard that is removed or replaced meanwhile is another file, or none, and
is then not taken over.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call
from shardsave._format.file_names import INDEX_NAME
from shardsave._format.header import Header, parse_header
from shardsave._format.index import MAX_INDEX_BYTES, Index, ShardRecord
from shardsave._format.index_parsing import parse_index
from shardsave._storage.directory import Directory
from shardsave._storage.lock import LockedDirectory
from shardsave._storage.shard_files import ShardFiles, file_identity
from shardsave._storage.staging import Staging
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError


class EarlierShard(NamedTuple):
    """A shard that is as its index says. ``identity``: of its file; it changes if the file is written to."""

    name: str
    record: ShardRecord
    header: Header
    identity: tuple[int, ...]


class EarlierCheckpoint:
    """The shards that the index of ``folder`` names; ``path`` is for messages."""

    def __init__(self, folder: LockedDirectory, index: Index, path: str, *, closes: bool) -> None:
        assert index.record is not None and index.record.durable
        self.folder = folder
        self.path = path
        self._index = index
        self._records = index.record.shards
        self._weight_map = index.weight_map
        self._closes = closes

    def close(self) -> None:
        """Closes the folder, unless it is that of the save."""
        if self._closes:
            self.folder.close()

    @property
    def held(self) -> Mapping[str, list[str]]:
        """Shard → the names of the tensors that it holds according to the index; in the order of the index's shards."""
        held: dict[str, list[str]] = {shard: [] for shard in self._records}
        for name, shard in self._weight_map.items():
            held[shard].append(name)
        return held

    def read(self, shard: str) -> EarlierShard | None:
        """Reads the header of ``shard``; returns None if it is no regular file. Raises CorruptCheckpointError, CallFailed."""
        status = self.folder.status_of(shard)
        if status is None:
            raise CorruptCheckpointError(f"corrupt checkpoint {self.path}: the index names {shard}, there is no such file")
        if not stat.S_ISREG(status.st_mode):
            return None
        record, identity = self._records[shard], file_identity(status)
        file = self.open(shard, identity)
        if file is None:
            return None
        with file:
            raw = ShardFiles.checked_start(file.fd, shard, record)
        return EarlierShard(shard, record, parse_header(raw, record.length, f"shard {shard}"), identity)

    def has(self, shard: EarlierShard) -> bool:
        """Whether the file of ``shard`` is still there, as it was. False, too, if it cannot be opened."""
        try:
            file = self.open(shard.name, shard.identity)
        except CallFailed:
            return False
        if file is not None:
            file.abandon()
        return file is not None

    def is_gone(self) -> bool:
        """Whether the index was removed or replaced since it was read."""
        try:
            if self.folder.status_of(INDEX_NAME) is None:
                return True
        except CallFailed:
            return False
        found = _read_index(self.folder)
        return isinstance(found, Index) and found != self._index

    def open(self, shard: str, identity: tuple[int, ...]) -> Descriptor | None:
        """Opens ``shard`` for reading; returns None if it is not the file with this ``identity`` any more. Raises CallFailed."""
        return _open(self.folder, shard, lambda found: found == identity)


class EarlierFolder:
    """The directory of a checkpoint that another process has opened as an `EarlierCheckpoint`, maybe on another machine. As a context
    manager it is closed at the end. For one thread; every method raises CallFailed."""

    def __init__(self, path: str) -> None:
        self._folder = Directory()
        self._folder.open_for_writing(path)

    def __enter__(self) -> EarlierFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.close()

    def open(self, shard: str, identity: Sequence[int]) -> Descriptor | None:
        """As `EarlierCheckpoint.open`. Each machine has numbers of its own for devices."""
        return _open(self._folder, shard, lambda found: found[1:] == tuple(identity[1:]))


def _open(folder: Directory, shard: str, is_right: Callable[[tuple[int, ...]], bool]) -> Descriptor | None:
    """Opens ``shard`` for reading; returns None if ``is_right`` does not accept the identity of its file. Raises CallFailed."""
    file = folder.open_regular(shard, follow=False)
    if file is not None and not is_right(file_identity(call(os.fstat, shard, file.fd))):
        file.abandon()
        return None
    return file


def open_earlier(path: str, here: Directory, staging: Staging) -> EarlierCheckpoint | str | None:
    """The checkpoint in the directory ``path``, or why its shards cannot be taken over; None if that directory is ``here``.

    ``here``, ``staging``: of the save that may take them over. Raises CallFailed for these two.
    """
    with ExitStack() as undo:
        folder = LockedDirectory(path, durable=False)
        undo.callback(folder.close)
        try:
            folder.open_for_writing(path)
            is_there = folder.is_in_place()
            own = call(os.fstat, path, folder.fd)
        except CallFailed as error:
            return error.reason
        place = call(os.fstat, here.name, here.fd)
        if os.path.samestat(own, place):
            return None
        if own.st_dev != place.st_dev:
            return "it is on another file system"
        if folder.shared:
            staging.make()
            folder.learn_owner(staging.directory)
        index = _read_index(folder) if is_there else "it is being replaced"
        if not isinstance(index, Index):
            return index
        undo.pop_all()
        return EarlierCheckpoint(folder, index, path, closes=True)


def _read_index(folder: LockedDirectory) -> Index | str:
    try:
        data = folder.read_all(INDEX_NAME, MAX_INDEX_BYTES, follow=False)
        if data is None:
            return f"there is no {INDEX_NAME}"
        if not folder.obeys(INDEX_NAME):
            return "everybody may write to it, and another user made its index, or may have changed it"
        index = parse_index(data, f"index {INDEX_NAME}")
    except CallFailed as error:
        return error.words
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        return str(error)
    return refusal(index) or index


def refusal(index: Index) -> str:
    """Why no shard of the checkpoint with this ``index`` may be taken over; "" if some may."""
    if index.record is None:
        return "shardsave did not save it"
    return "" if index.record.durable else "it was saved with durable=False"
