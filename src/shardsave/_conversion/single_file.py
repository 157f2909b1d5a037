"""One file made of tensors, safetensors' or torch's own: written beside its place under another name, and moved there whole."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import torch

from shardsave._common.backend import engine_name
from shardsave._common.os_calls import CallFailed, Descriptor, allocate, call, inode_of, make_folders, open_regular
from shardsave._common.sources import TensorSource
from shardsave._engine import engine
from shardsave._engine.transfer import TransferFault
from shardsave._format.header import CHECKSUM_KEY, with_sums
from shardsave._saving.shards import plan_blocks, plan_shards
from shardsave._state.module import Entry
from shardsave._storage.staging import end_shard
from shardsave.errors import (
    DurabilityUncertainError,
    OutOfSpaceError,
    SaveNotCommittedError,
    ShardSaveError,
    UnsupportedTensorError,
)

#: The most that a tick covers where torch writes, in bytes.
_STEP = 8 << 20

#: How the names of files on their way end, and of the directories that they may need.
_SCRATCH, _WORKSPACE = ".part", ".d"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class Written(NamedTuple):
    """How a file was written, for the report."""

    direct: bool
    staging_bytes: int
    engine: str
    notes: tuple[str, ...] = ()


class NewFile:
    """A file on its way to ``path``: left without a commit, it is removed, and what was at ``path`` is as it was.

    It is locked, so that whoever writes to the same path later can tell the scratch files of the living from those of the dead.
    """

    def __init__(self, path: str, durable: bool) -> None:
        self.path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self.folder, self._name = os.path.split(self.path)
        self._stem = f".{self._name[:100]}."
        self._scratch = ""
        self.file = Descriptor()
        self._lock = Descriptor()
        self._durable = durable
        self._directory = Descriptor()
        self._there = False
        self._moved = False

    def __enter__(self) -> NewFile:
        try:
            make_folders(self.folder, self._durable)
            self._directory.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            self._remove_dead()
            self._create()
        except CallFailed as error:
            self.close()
            raise self.failure(error) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def workspace(self) -> str:
        """The path of a directory that goes when this file is done; whoever needs it makes it."""
        return os.path.join(self.folder, self._scratch + _WORKSPACE)

    def _create(self) -> None:
        while True:
            self._scratch = f"{self._stem}{secrets.token_hex(8)}{_SCRATCH}"
            self.file.open(self._scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, self._directory.fd)
            self._there = True
            self._lock.open(self._scratch, os.O_RDONLY | os.O_NOFOLLOW, self._directory.fd)
            with suppress(OSError):  # no locks here: then nobody takes it for a dead one either
                fcntl.flock(self._lock.fd, fcntl.LOCK_EX)
            if call(os.fstat, self._scratch, self.file.fd).st_nlink:
                return
            self.file.abandon()  # it was taken for a dead one before it was locked
            self._lock.abandon()

    def _remove_dead(self) -> None:
        """Removes what writers to the same path left that were killed."""
        pattern = re.compile(rf"({re.escape(self._stem)}[0-9a-f]{{16}}\{_SCRATCH})(?:\{_WORKSPACE})?")
        found = map(pattern.fullmatch, call(os.listdir, self.folder, self._directory.fd))
        for name in {match[1] for match in found if match is not None}:
            with Descriptor() as file, suppress(OSError, CallFailed):
                there = open_regular(file, name, self._directory.fd, follow=False)
                if there:
                    fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(os.path.join(self.folder, name + _WORKSPACE), ignore_errors=True)
                if there:
                    os.unlink(name, dir_fd=self._directory.fd)

    def commit(self) -> None:
        """Makes the file durable where that was asked for, and gives it its name."""
        try:
            if self._durable:
                call(os.fsync, self.path, self.file.fd)
            made = inode_of(self._scratch, self._directory.fd)
            self.file.close(self.path)
        except CallFailed as error:
            raise self.failure(error) from error
        folders = {"src_dir_fd": self._directory.fd, "dst_dir_fd": self._directory.fd}
        try:
            call(os.rename, self.path, self._scratch, self._name, **folders)
            self._moved = True
            if self._durable:
                call(os.fsync, self.folder, self._directory.fd)
        except CallFailed as error:
            self._moved = self._moved or self._has_its_name(made)
            if not self._moved:
                raise self.failure(error) from error
            raise DurabilityUncertainError(
                f"written, but not known to be durable: {self.path}: {error.call} of {error.path}: {error.strerror}, once the "
                f"file had its name; a loss of power may bring back what was there before"
            ) from error

    def _has_its_name(self, made: tuple[int, int] | None) -> bool:
        """Whether a rename that failed was made all the same, as on a network file system whose answer got lost."""
        with suppress(CallFailed):
            return made is not None and inode_of(self._name, self._directory.fd) == made
        return False

    def failure(self, error: CallFailed) -> ShardSaveError:
        kind = OutOfSpaceError if error.errno in _NO_ROOM else SaveNotCommittedError
        return kind(
            f"cannot write {self.path}: {error.call}: {error.strerror}; nothing was written, what was there is as it was"
        )

    def close(self) -> None:
        if self._there:
            with suppress(OSError):  # which not even ignore_errors keeps rmtree from
                shutil.rmtree(self.workspace, ignore_errors=True)
            if not self._moved:
                with suppress(OSError):
                    os.unlink(self._scratch, dir_fd=self._directory.fd)
        for opened in (self.file, self._lock, self._directory):
            opened.abandon()


def write_safetensors(
    new: NewFile, entries: Sequence[Entry], metadata: Mapping[str, str], durable: bool, tick: Callable[[int], object]
) -> Written:
    """Makes ``new`` a safetensors file with all of ``entries``; of tied ones the first, the others named in its metadata."""
    stored = [entry for entry in entries if entry.tied_to is None]
    ties = {entry.name: entry.tied_to for entry in entries if entry.tied_to is not None}
    if taken := sorted(ties.keys() & {"format", CHECKSUM_KEY}):
        raise UnsupportedTensorError(
            f"cannot write {new.path}: a tied tensor is named in the file's metadata, {taken[0]!r} means something else there; "
            f"rename it, or convert to a directory; nothing was written"
        )
    (shard,) = plan_shards(stored, sys.maxsize, apart=False, more={**metadata, **ties})
    fd, path = new.file.fd, new.path
    try:
        allocate(fd, path, shard.reserved_bytes)
        done = engine.write(
            [fd],
            plan_blocks([shard]),
            shard.pieces,
            access="direct" if durable else "buffered",
            start_writeback=durable,
            tick=tick,
        )
        end_shard(fd, path, len(shard.header) + shard.layout.data_bytes, with_sums(shard.header, done.sums))
    except TransferFault as fault:
        raise new.failure(CallFailed(fault.call, path, fault.errno, str(fault))) from fault
    except CallFailed as error:
        raise new.failure(error) from error
    new.commit()
    return Written(all(done.direct), done.staging_bytes, engine_name(), done.notes)


class _Sink:
    """What torch.save writes into: a new file, in steps, so that whoever waits is told and what was read can be let go."""

    def __init__(self, new: NewFile, tick: Callable[[int], object]) -> None:
        self.failed: BaseException | None = None  # torch raises another error over it
        self._new, self._tick, self._done = new, tick, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        try:
            while at < len(view):
                at += call(os.write, self._new.path, self._new.file.fd, view[at : at + _STEP])
                self._tick(self._done + at)
        except BaseException as error:
            self.failed = error
            raise
        self._done += at
        return at

    def flush(self) -> None:
        pass


def write_torch(new: NewFile, entries: Sequence[Entry], tick: Callable[[int], object]) -> Written:
    """Makes ``new`` a file of torch.save, with a plain dict from names to tensors; tied ones share a storage in it, too.

    Each tensor of ``entries`` must lie in memory as it is to lie in the file: `fits_torch`.
    """
    state: dict[str, torch.Tensor] = {}
    for entry in entries:
        assert fits_torch(entry)
        state[entry.name] = state[entry.tied_to] if entry.tied_to is not None else _with_own_storage(entry.tensor)
    sink = _Sink(new, tick)
    try:
        torch.save(state, sink)  # type: ignore[arg-type]
    except BaseException:
        failed, sink.failed = sink.failed, None  # torch's writer has the sink, and no garbage collector sees that
        if isinstance(failed, CallFailed):
            raise new.failure(failed) from failed
        if failed is not None:
            raise failed from None
        raise
    new.commit()
    return Written(False, _STEP, "torch")


def fits_torch(entry: Entry) -> bool:
    """Whether torch.save would write this tensor as it lies in memory, and nothing else with it."""
    return isinstance(entry.source, TensorSource) and entry.source.memory() is not None


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor whose storage has nothing else in it: torch.save writes whole storages."""
    storage, begin = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    length = tensor.numel() * tensor.element_size()
    own = storage[begin : begin + length]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())
