"""Opening a checkpoint for reading: from a path to open, checked shards and the place of every tensor in them."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from shardsave._common.gc_pause import gc_paused
from shardsave._common.os_calls import absolute_path
from shardsave._common.strict_json import glimpse
from shardsave._format.header import CHECKSUM_KEY, Header
from shardsave._format.index import TRAINING, FileRecord, Index, Moment, Part, Record, ties_in_metadata
from shardsave._format.index_parsing import parse_index
from shardsave._format.quantised import torchao_entries
from shardsave._format.rank_files import SHARDING_KEY, SHARDING_VERSION_KEY
from shardsave._storage.companions import companion_notes
from shardsave._storage.find import FoundFiles, find
from shardsave._storage.located import Located as Located
from shardsave._storage.located import StoredChunk, located
from shardsave._storage.rank_files import assemble, chunks_of, refuse_lone_rank, shape_notes
from shardsave._storage.several import refuse_several
from shardsave._storage.shard_files import Broken, HeaderCheck, ShardFiles
from shardsave._storage.training import TrainingFiles, bytes_in, open_training
from shardsave.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DirectoryBusyError,
    IncompatibleCheckpointError,
    ShardSaveError,
)

#: For how many seconds a reader starts over while savers keep replacing the checkpoint.
CHANGING_SECONDS = 30.0

#: The parts that a checkpoint may have beside its weights.
PARTS = ("architecture", "program", "extra tensors", TRAINING)


class Checkpoint(ShardFiles):
    """An open checkpoint: its index, its shards, and the place of every tensor. As a context manager it closes itself."""

    def __init__(self, path: str, files: FoundFiles, index: Index | None, header_check: HeaderCheck | None) -> None:
        record = index.record if index is not None else None
        records = record.shards if record is not None else None
        super().__init__(path, files.folder, files.index_name if index is not None else None, records, header_check)
        self.index = index
        self._index_name = files.index_name
        self._index_bytes = files.index_bytes
        self.tensors: dict[str, Located] = {}
        self.kept: dict[str, Located] = {}  # the extra tensors
        self.documents: dict[str, bytes] = {}  # part → its JSON
        self.training: TrainingFiles | None = None  # the training state, if it was opened
        self.file_metadata: dict[str, str] = {}  # `__metadata__` of a lone file
        self.quantised: dict[str, str] = {}  # what torchao says in `__metadata__` of the opened files
        self.shape_notes: tuple[str, ...] = ()  # what nobody can tell about the shapes of tensors in chunks
        self._ties: dict[str, str] = {}  # of a lone file

    @property
    def record(self) -> Record | None:
        return self.index.record if self.index is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which its bytes are stored."""
        return self.index.ties if self.index is not None else self._ties

    @property
    def flags(self) -> Mapping[str, bool] | None:
        """Name in the saved module → frozen; None if unknown."""
        if self.record is None:
            return None
        return self.record.flags if self.record.module_flags is None else self.record.module_flags

    @property
    def stored_flags(self) -> Mapping[str, bool] | None:
        """Name on disk → frozen, including tied names; None if unknown."""
        return self.record.flags if self.record is not None else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata that were saved; of a lone file, its ``__metadata__`` without the entries that mean something else there."""
        if self.record is not None:
            return self.record.metadata
        reserved = {*self._ties, *self.quantised, "format", CHECKSUM_KEY, SHARDING_KEY, SHARDING_VERSION_KEY}
        return {name: value for name, value in self.file_metadata.items() if name not in reserved}

    @property
    def parts(self) -> Mapping[str, Part]:
        """Role → part, also of those that this version does not know."""
        return self.record.parts if self.record is not None else {}

    def part_bytes(self, part: Part) -> int:
        """The length of the file of ``part``; of one with a directory of its own, of all its files there, as far as they can be seen."""
        if part.directory is None:
            return part.record.length
        return bytes_in(self.path_of(part.directory)) or part.record.length

    def all_located(self, weights: Iterable[Located]) -> Iterator[Located]:
        """``weights``, and the tensors of all parts that were opened."""
        yield from weights
        yield from self.kept.values()
        if self.training is not None:
            yield from self.training.tensors.values()

    def is_shared(self, shard: str) -> bool:
        """Whether another checkpoint shares the bytes of ``shard``, or did so once."""
        if self.record is not None and shard in self.record.shared:
            return True
        try:
            return os.stat(self.path_of(shard)).st_nlink > 1
        except OSError:
            return False

    @property
    def moment(self) -> Moment:
        """The moment of a training at which it was saved."""
        return self.record.moment if self.record is not None else Moment()

    @property
    def files(self) -> tuple[str, ...]:
        """The shards that were opened, the files of all parts that this version knows, and those of a training state that was opened."""
        training = self.training.files if self.training is not None else ()
        return (*self.shards, *(self.parts[role].file for role in PARTS if role in self.parts), *training)

    @property
    def unknown_parts(self) -> list[str]:
        """The roles of the parts that this version does not know."""
        return sorted(self.parts.keys() - {*PARTS})

    @property
    def companions(self) -> Mapping[str, FileRecord]:
        return self.record.companions if self.record is not None else {}

    def notes(self, *, whole: bool = False) -> tuple[str, ...]:
        """What a reader must know beside the tensors: `shape_notes`, and the companions that were not saved with these weights.

        These companions are not named if a save has replaced the checkpoint meanwhile. ``whole``: read the weights of an adapter to their
        end, not only their header.
        """
        shards = self.record.shards.values() if self.record is not None else ()
        notes = companion_notes(self._folder, self.companions, shards, whole=whole) if self.companions else ()
        return (*self.shape_notes, *(notes if notes and not self._index_changed() else ()))

    def identity(self) -> bytes:
        """Equal in two processes that opened the same checkpoint: a hash of the index or, without one, of what was found in the files."""
        data = self._index_bytes if self.index is not None else None
        if data is None:
            data = repr(
                sorted((t.name, t.dtype, t.shape, t.shard, t.offset, t.checksum) for t in self.tensors.values())
            ).encode()
        return hashlib.sha256(data).digest()[:16]

    def _index_changed(self) -> bool:
        """Whether the index was replaced since it was read."""
        try:
            return find(os.path.join(self._folder, self._index_name)).index_bytes != self._index_bytes
        except CheckpointNotFoundError:
            return True

    @property
    def stored_names(self) -> Iterable[str]:
        """The names under which bytes are stored, in the order of the index, whether or not their shard was opened."""
        return self.index.weight_map if self.index is not None else self.tensors

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _admit(self, shards: Mapping[str, int], broken: Broken) -> None:
        """Opens ``shards`` (file → how many tensors it holds according to the index) and notes the places of their tensors."""
        self.shards = tuple(shards)
        for shard, count in sorted(shards.items()):  # in the order in which they will be read
            try:
                file, header = self.open_shard(shard)
                self.hold(shard, file)
                self._note_tensors(shard, header, count)
            except ShardSaveError as error:
                # Without an index, nothing says that the file should be another one than it is.
                is_damaged = self.index is not None or isinstance(error, CorruptCheckpointError)
                if broken is None or not is_damaged:
                    raise
                self.drop(shard)
                broken[shard] = error

    def _admit_ranks(self, files: tuple[str, ...], broken: Broken) -> None:
        """Opens ``files``, each with the chunks of one rank, and notes the places of the tensors that these chunks make up."""
        self.shards = files
        self.shape_notes = shape_notes(files)
        chunks: defaultdict[str, list[StoredChunk]] = defaultdict(list)
        for file in files:
            try:
                opened, header = self.open_shard(file)
                self.hold(file, opened)
                for name, chunk in chunks_of(file, header, located(file, header)):
                    chunks[name].append(chunk)
            except ShardSaveError as error:
                if broken is None:
                    raise
                self.drop(file)
                broken[file] = error
        try:
            if not broken:
                self.tensors = assemble(self.path, files, chunks)
                return
        except ShardSaveError as error:
            if broken is None:
                raise
            broken["shard-*.safetensors"] = error
        # What is there does not make up whole tensors: each chunk counts as one.
        self.tensors = {f"{name} in {c.shard}": c for name, stored in chunks.items() for _, c in stored}

    def _admit_parts(self, roles: Iterable[str], broken: Broken) -> None:
        """Opens those parts ``roles`` that the checkpoint has: reads JSON whole, and notes the places of extra tensors."""
        for role in roles:
            if role not in self.parts:
                continue
            try:
                self._admit_part(role, self.parts[role], broken)
            except ShardSaveError as error:
                if broken is None:
                    raise
                broken[self.parts[role].file] = error

    def _admit_part(self, role: str, part: Part, broken: Broken) -> None:
        shard = part.file
        assert self.records is not None  # an index with parts has records
        self.records[shard] = part.record
        if not shard.endswith(".json"):
            file, header = self.open_shard(shard)
            self.hold(shard, file)
            self.kept.update(located(shard, header))
        elif role == TRAINING:
            self.training = open_training(self, part, broken)
        else:
            self.documents[role] = self.read_document(shard)

    def _note_tensors(self, shard: str, header: Header, count: int) -> None:
        held = header.tensors.names
        if self.index is not None and not len(held) == count == [*map(self.index.weight_map.get, held)].count(shard):
            named = {name for name, file in self.index.weight_map.items() if file == shard}
            missing, surplus = named.difference(held), set(held) - named
            difference = (
                f"the index says that it holds {glimpse(min(missing))}, it does not"
                if missing
                else f"the index does not say that it holds {glimpse(min(surplus))}, it does"
            )
            raise CorruptCheckpointError(f"corrupt shard {shard}: {difference}; index and shard belong to different saves")
        if self.record is None and SHARDING_KEY in header.metadata:
            refuse_lone_rank(self.path_of(shard), shard, self._folder, header)
        self.tensors.update(located(shard, header))
        self.quantised.update(torchao_entries(header.metadata))
        if self.index is None:
            self.file_metadata.update(header.metadata)
            self._ties = ties_in_metadata(header.metadata, self.tensors)
            self.shape_notes = shape_notes([shard]) if SHARDING_KEY in header.metadata else ()


def open_checkpoint(
    path: str | os.PathLike[str],
    wanted: Callable[[str], bool] | None = None,
    *,
    parts: Iterable[str] = (),
    broken: Broken = None,
    header_check: HeaderCheck | None = None,
) -> Checkpoint:
    """Opens the checkpoint at ``path``: a directory, an index or one safetensors file, written by shardsave or another library.

    With ``wanted`` only shards that hold a wanted tensor are opened; all tensors of these shards are listed. ``parts``: the roles of
    the parts to open. With ``broken``, a file that cannot be opened is left out, and its error is put there. ``header_check``: a
    further check of each header. Starts over if the index is replaced meanwhile.
    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, DirectoryBusyError; ShardSaveError itself if
    a file cannot be read.
    """
    path = absolute_path(os.fspath(path))
    deadline = time.monotonic() + CHANGING_SECONDS
    while True:
        files = find(path)
        try:
            checkpoint = _open_found(path, files, wanted, parts, broken, header_check)
            if not broken or not _changed(path, files):
                return checkpoint
            checkpoint.close()
            broken.clear()
        except (CheckpointNotFoundError, CorruptCheckpointError):
            if not _changed(path, files):
                raise
        except IncompatibleCheckpointError:
            if not files.ranks or find(path).ranks == files.ranks:  # a save may be about to remove those that it has replaced
                raise
        if time.monotonic() > deadline:
            raise DirectoryBusyError(
                f"cannot read {path}: its index was replaced each time while its shards were opened, for "
                f"{CHANGING_SECONDS:.0f} s; another process keeps saving there"
            )


@gc_paused()
def _open_found(
    path: str,
    files: FoundFiles,
    wanted: Callable[[str], bool] | None,
    parts: Iterable[str],
    broken: Broken,
    header_check: HeaderCheck | None,
) -> Checkpoint:
    index = parse_index(files.index_bytes, f"index {files.index_name}") if files.index_bytes is not None else None
    refuse_several(files, index)
    checkpoint = Checkpoint(path, files, index, header_check)
    try:
        if index is not None:
            checkpoint._admit(_shards_to_open(index, wanted), broken)
            checkpoint._admit_parts(parts, broken)
        elif files.lone is not None:
            checkpoint._admit({files.lone: 0}, broken)
        else:
            checkpoint._admit_ranks(files.ranks, broken)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _shards_to_open(index: Index, wanted: Callable[[str], bool] | None) -> dict[str, int]:
    """File → how many tensors it holds."""
    counts = dict.fromkeys(index.record.shards if index.record is not None else (), 0) | Counter(index.weight_map.values())
    if wanted is not None:
        needed = {shard for name, shard in index.weight_map.items() if wanted(name)}
        needed.update(index.weight_map[stored] for name, stored in index.ties.items() if wanted(name))
        return {shard: count for shard, count in counts.items() if shard in needed}
    return counts


def _changed(path: str, seen: FoundFiles) -> bool:
    """Whether the index at ``path`` is no longer the one in ``seen``."""
    try:
        return find(path).index_bytes != seen.index_bytes
    except CheckpointNotFoundError:
        return seen.index_bytes is not None
