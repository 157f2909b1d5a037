"""Opening a checkpoint for reading: from a path to open, checked shards and the place of every tensor in them."""

from __future__ import annotations

import errno
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from types import TracebackType
from typing import Any, NamedTuple, Union

from shardsave._collector import collector_still
from shardsave._companions import companion_notes
from shardsave._crc64 import crc64
from shardsave._files import CallFailed, Descriptor, call
from shardsave._find import TORCH_SAVE_HINT, Found, cannot_read, find, open_regular
from shardsave._format import Header, parse_header, read_header, read_start
from shardsave._index import INDEX_NAME, LONE_NAME, FileRecord, Index, Part, Record, ShardRecord, parse_index, told_ties
from shardsave._json import glimpse
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    IncompatibleCheckpointError,
    ShardSaveError,
)

#: How long a reader starts over while others keep replacing the checkpoint under it, in seconds.
CHANGING_SECONDS = 30.0

#: How a pickle begins, of every protocol that is binary and in use.
_PICKLES = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")

#: What a checkpoint may have beside its weights.
PARTS = ("architecture", "program", "extra tensors")

#: Shards that could not be opened, and why.
Broken = Union[dict[str, ShardSaveError], None]


class Located(NamedTuple):
    """Where a stored tensor lies: ``offset`` bytes into the file ``shard``; ``checksum`` is None where none was stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: str
    offset: int
    checksum: int | None


class Checkpoint:
    """A checkpoint held open. Its descriptors keep the bytes readable even when a save replaces the files meanwhile."""

    def __init__(self, path: str, folder: str, index_name: str, index: Index | None, index_bytes: bytes | None) -> None:
        self.path = path
        self.index = index
        self._index_bytes = index_bytes
        self.tensors: dict[str, Located] = {}
        self.kept: dict[str, Located] = {}  # what a model needs beside the weights
        self.documents: dict[str, bytes] = {}  # part → its JSON
        self.file_metadata: dict[str, str] = {}  # what the header of a lone file says beside its tensors
        self._ties: dict[str, str] = {}  # of a lone file
        self.shards: tuple[str, ...] = ()
        self._folder = folder
        self._index_name = index_name
        self.allowance = descriptor_allowance()  # how many shards are held open at a time
        self._open: dict[str, Descriptor] = {}
        self._seen: dict[str, tuple[int, ...]] = {}  # which file each shard was when it was first opened
        self._records: dict[str, ShardRecord] = (
            dict(index.record.shards) if index is not None and index.record is not None else {}
        )

    @property
    def record(self) -> Record | None:
        return self.index.record if self.index is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which its bytes are stored."""
        return self.index.ties if self.index is not None else self._ties

    @property
    def flags(self) -> Mapping[str, bool] | None:
        """By the names that the module had which was saved."""
        if self.record is None:
            return None
        return self.record.flags if self.record.module_flags is None else self.record.module_flags

    @property
    def stored_flags(self) -> Mapping[str, bool] | None:
        """By the names that tensors have on disk, tied ones too."""
        return self.record.flags if self.record is not None else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.record.metadata if self.record is not None else {}

    @property
    def files(self) -> tuple[str, ...]:
        """The shards that were asked for, and the files of all parts that this version knows."""
        parts = self.record.parts if self.record is not None else {}
        return (*self.shards, *(parts[role].file for role in PARTS if role in parts))

    @property
    def companions(self) -> Mapping[str, FileRecord]:
        return self.record.companions if self.record is not None else {}

    def companion_notes(self) -> tuple[str, ...]:
        """Which files beside the weights are not those that were saved with them; nothing where a save has just replaced all."""
        notes = companion_notes(self._folder, self.companions) if self.companions else ()
        return notes if notes and not self._index_changed() else ()

    def _index_changed(self) -> bool:
        """Whether the index is another one by now."""
        try:
            return find(os.path.join(self._folder, self._index_name)).index_bytes != self._index_bytes
        except CheckpointNotFoundError:
            return True

    def path_of(self, shard: str) -> str:
        """The path of ``shard``, for messages and for those who open it themselves."""
        return os.path.join(self._folder, shard)

    def descriptors(self, shards: Sequence[str]) -> list[int]:
        """Open descriptors of ``shards``, at most `allowance` of them; the others are closed first where they are too many."""
        spare = self._open.keys() - set(shards)
        lacking = [shard for shard in shards if shard not in self._open]
        while spare and len(self._open) + len(lacking) > self.allowance:
            self.drop(spare.pop())
        return [self.descriptor(shard) for shard in shards]

    def descriptor(self, shard: str) -> int:
        """An open descriptor of ``shard``; where it was closed for want of descriptors, or by a fork, opened and checked again.

        Raises DirectoryBusyError where it is another file by then.
        """
        if shard not in self._open or self._open[shard].fd < 0:
            self._open[shard], _ = self._open_shard(shard)
        return self._open[shard].fd

    def release(self, shard: str) -> None:
        """Closes ``shard`` when more shards are in use than descriptors can be held for."""
        if len(self.shards) > self.allowance:
            self.drop(shard)

    def drop(self, shard: str) -> None:
        """Closes ``shard``, whose descriptor is not needed for now."""
        if shard in self._open:
            self._open.pop(shard).abandon()

    @property
    def stored_names(self) -> Iterable[str]:
        """The names under which bytes are stored, in the order of the index, whether or not their shard was opened."""
        return self.index.weight_map if self.index is not None else self.tensors

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].abandon()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _admit(self, shards: Mapping[str, frozenset[str]], broken: Broken) -> None:
        """Opens ``shards`` (file → the names that the index says it holds) and notes where their tensors lie."""
        self.shards = tuple(shards)
        for shard, names in sorted(shards.items()):  # as they are read
            try:
                file, header = self._open_shard(shard)
                self._hold(shard, file)
                self._note_tensors(shard, header, names)
            except ShardSaveError as error:
                if broken is None:
                    raise
                self.drop(shard)
                broken[shard] = error

    def _admit_parts(self, roles: Iterable[str], broken: Broken) -> None:
        """Reads those of the parts ``roles`` that are there: JSON at once, of tensors where they lie."""
        parts = self.record.parts if self.record is not None else {}
        for role in roles:
            if role not in parts:
                continue
            try:
                self._admit_part(role, parts[role])
            except ShardSaveError as error:
                if broken is None:
                    raise
                broken[parts[role].file] = error

    def _admit_part(self, role: str, part: Part) -> None:
        shard = part.file
        self._records[shard] = part.record
        if not shard.endswith(".json"):
            file, header = self._open_shard(shard)
            self._hold(shard, file)
            self.kept.update(_located(shard, header))
            return
        try:
            with self._opened(shard) as file:
                self.documents[role] = self._checked_start(file.fd, shard, part.record)
        except CallFailed as error:
            raise cannot_read(self.path_of(shard), error) from error

    def _hold(self, shard: str, file: Descriptor) -> None:
        if len(self._open) < self.allowance:
            self._open[shard] = file
        else:
            file.abandon()

    def _open_shard(self, shard: str) -> tuple[Descriptor, Header]:
        file = self._opened(shard)
        try:
            found = _identity(call(os.fstat, shard, file.fd))
            if self._seen.setdefault(shard, found) != found:
                raise DirectoryBusyError(self._replaced(shard))
            return file, self._checked_header(file.fd, shard)
        except CallFailed as error:
            file.abandon()
            raise cannot_read(self.path_of(shard), error) from error
        except BaseException:
            file.abandon()
            raise

    def _opened(self, shard: str) -> Descriptor:
        path = self.path_of(shard)
        file = open_regular(path, f"shard {shard}")
        if file is None and shard in self._seen:
            raise DirectoryBusyError(self._replaced(shard))
        if file is None:
            wanted = f"the index names {shard}" if self.index is not None else f"{shard} was expected"
            found = "it is a link to nothing" if os.path.islink(path) else "there is no such file"
            raise CorruptCheckpointError(
                f"corrupt checkpoint {self.path}: {wanted}, {found}; the checkpoint was copied or downloaded in part"
            )
        return file

    def _replaced(self, shard: str) -> str:
        if len(self.shards) > self.allowance:
            why = f"only {self.allowance} of {len(self.shards)} shards could be held open"
            advice = "load again, or raise the limit of open files (ulimit -n)"
        else:
            why, advice = "the descriptor was closed by a fork", "open the checkpoint again"
        return (
            f"cannot read {self.path_of(shard)}: the file that was there at first was expected, it was replaced or removed "
            f"during the load, most likely by a save; {why}: {advice}"
        )

    def _checked_header(self, descriptor: int, shard: str) -> Header:
        """The header of ``shard``; where the index has a record of it, not a byte is looked at before its checksum is right."""
        where = f"shard {shard}"
        if self.record is None:
            length = call(os.fstat, shard, descriptor).st_size
            try:
                header = parse_header(read_header(descriptor, length, where), length, where)
            except CorruptCheckpointError:
                self._refuse_torch_save(descriptor, shard)
                raise
            if self.index is not None and header.sums is not None:
                raise CorruptCheckpointError(
                    f"corrupt index {self._index_name}: a record of {shard} expected, which shardsave wrote, it has none; "
                    f"one of the two was changed or replaced after it was saved"
                )
            return header
        record = self._records[shard]
        header = parse_header(self._checked_start(descriptor, shard, record), record.length, where)
        if header.sums is None:
            raise CorruptCheckpointError(
                f"corrupt {where}: checksums of its tensors expected, as the index has a record of it, its header has none; "
                f"the file was changed after it was saved"
            )
        return header

    def _refuse_torch_save(self, descriptor: int, shard: str) -> None:
        """What begins like a file of torch.save is not a damaged one of another kind."""
        start = read_start(descriptor, 4)
        kind = "a zip archive" if start == b"PK\3\4" else "a pickle" if start[:2] in _PICKLES else None
        if kind is not None:
            raise IncompatibleCheckpointError(
                f"cannot read {self.path_of(shard)}: a safetensors file was expected, it is {kind}, as torch.save writes; "
                f"{TORCH_SAVE_HINT}; the file is as it was"
            )

    @staticmethod
    def _checked_start(descriptor: int, shard: str, record: ShardRecord) -> bytes:
        """The header of ``shard``, or all of it where it has no more; the index says its length and checksum."""
        length = call(os.fstat, shard, descriptor).st_size
        if length != record.length:
            fate = "it was cut, half copied or half downloaded" if length < record.length else "something was appended to it"
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says {record.length} bytes, the file has {length}; {fate}, or it belongs to another save"
            )
        raw = read_start(descriptor, record.header_length)
        if (found := crc64(raw)) != record.header_crc:
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: the index says a header with checksum {record.header_crc:016x}, the file has {found:016x}; "
                f"the file was changed after it was saved, or belongs to another save"
            )
        return raw

    def _note_tensors(self, shard: str, header: Header, names: frozenset[str]) -> None:
        held = set(header.tensors.names)
        if self.index is not None and held != names:
            lacking, surplus = names - held, held - names
            found = (
                f"the index says that it holds {glimpse(min(lacking))}, it does not"
                if lacking
                else f"the index does not say that it holds {glimpse(min(surplus))}, it does"
            )
            raise CorruptCheckpointError(f"corrupt shard {shard}: {found}; index and shard belong to different saves")
        self.tensors.update(_located(shard, header))
        if self.index is None:
            self.file_metadata.update(header.metadata)
            self._ties = told_ties(header.metadata, self.tensors)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from every other, and from itself before it was changed."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _located(shard: str, header: Header) -> Iterator[tuple[str, Located]]:
    names, dtypes, shapes, begins, nbytes = header.tensors
    offsets = [header.data_start + begin for begin in begins]
    sums = header.sums if header.sums is not None else repeat(None)
    return zip(names, map(Located, names, dtypes, shapes, nbytes, repeat(shard), offsets, sums))


def open_checkpoint(
    path: str | os.PathLike[str],
    wanted: Callable[[str], bool] | None = None,
    *,
    parts: Iterable[str] = (),
    broken: Broken = None,
) -> Checkpoint:
    """Opens what is at ``path``: a directory, an index or one safetensors file, written by us or by others.

    With ``wanted`` only the shards that hold a wanted tensor are opened, but whole shards are listed. ``parts``: what else is read.
    Files that cannot be opened are put into ``broken``, where that is given, and left out. Starts over while the index changes
    under it. Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError.
    """
    path = os.fspath(path)
    deadline = time.monotonic() + CHANGING_SECONDS
    while True:
        found = find(path)
        try:
            checkpoint = _open_found(path, found, wanted, parts, broken)
            if not broken or not _changed(path, found):
                return checkpoint
            checkpoint.close()
            broken.clear()
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if not _changed(path, found):
                raise
        if time.monotonic() > deadline:
            raise DirectoryBusyError(
                f"cannot read {path}: its index was replaced each time while its shards were opened, for "
                f"{CHANGING_SECONDS:.0f} s; another process keeps saving there"
            )


@collector_still()
def _open_found(
    path: str, found: Found, wanted: Callable[[str], bool] | None, parts: Iterable[str], broken: Broken
) -> Checkpoint:
    index = parse_index(found.index_bytes, f"index {found.index_name}") if found.index_bytes is not None else None
    if index is not None and found.lone is not None:
        _refuse_unless_superseded(found.folder, index.record, found.lone)
    checkpoint = Checkpoint(path, found.folder, found.index_name, index, found.index_bytes)
    try:
        if index is not None:
            checkpoint._admit(_shards_to_open(index, wanted), broken)
            checkpoint._admit_parts(parts, broken)
        elif found.lone is not None:
            checkpoint._admit({found.lone: frozenset()}, broken)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _shards_to_open(index: Index, wanted: Callable[[str], bool] | None) -> dict[str, frozenset[str]]:
    named: defaultdict[str, set[str]] = defaultdict(set)
    named.update((shard, set()) for shard in (index.record.shards if index.record is not None else ()))
    for name, shard in index.weight_map.items():
        named[shard].add(name)
    if wanted is not None:
        needed = {shard for name, shard in index.weight_map.items() if wanted(name)}
        needed.update(index.weight_map[stored] for name, stored in index.ties.items() if wanted(name))
        return {shard: frozenset(names) for shard, names in named.items() if shard in needed}
    return {shard: frozenset(names) for shard, names in named.items()}


def _changed(path: str, seen: Found) -> bool:
    try:
        return find(path).index_bytes != seen.index_bytes
    except CheckpointNotFoundError:
        return seen.index_bytes is not None


def _refuse_unless_superseded(folder: str, record: Record | None, lone: str) -> None:
    path = os.path.join(folder, lone)
    try:
        found = call(os.stat, path, path)
    except CallFailed as error:
        if error.errno == errno.ENOENT:
            return  # just removed by the save that replaced it
        raise cannot_read(path, error) from error
    stale = record.supersedes if record is not None else None
    if stale is not None and (stale.size, stale.mtime_ns) == (found.st_size, found.st_mtime_ns):
        return
    raise IncompatibleCheckpointError(
        f"cannot tell which checkpoint is meant: {folder}: one of {INDEX_NAME} and {LONE_NAME} was expected, both are there, "
        f"and the index does not replace the file; give the path of the one to load, or remove the other"
    )


def descriptor_allowance() -> int:
    """How many shards may be held open: half of what this process may open yet, so that the rest of it can go on."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        in_use = len(os.listdir("/proc/self/fd"))
    except OSError:
        in_use = 0
    return max(1, ((soft if soft != resource.RLIM_INFINITY else 1 << 16) - in_use) // 2)
