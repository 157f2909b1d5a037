"""An open checkpoint: what its index and its headers say, its parts, and the place of every tensor in its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.index import TRAINING, FileRecord, Index, Moment, Part, Record
from shardsave._format.rank_files import SHARDING_KEY, SHARDING_VERSION_KEY
from shardsave._storage.companions import companion_notes
from shardsave._storage.find import FoundFiles, find
from shardsave._storage.located import Located as Located
from shardsave._storage.shard_files import HeaderCheck, ShardFiles
from shardsave._storage.training import TrainingFiles, bytes_in
from shardsave.errors import CheckpointNotFoundError

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
        self.lone_ties: dict[str, str] = {}

    @property
    def record(self) -> Record | None:
        return self.index.record if self.index is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which its bytes are stored."""
        return self.index.ties if self.index is not None else self.lone_ties

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
        reserved = {*self.lone_ties, *self.quantised, "format", CHECKSUM_KEY, SHARDING_KEY, SHARDING_VERSION_KEY}
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
        notes = companion_notes(self.folder, self.companions, shards, whole=whole) if self.companions else ()
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
            return find(os.path.join(self.folder, self._index_name)).index_bytes != self._index_bytes
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
