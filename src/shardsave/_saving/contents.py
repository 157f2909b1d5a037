"""Plans everything that one save will write, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from shardsave._common.sources import ByteSource
from shardsave._common.strict_json import NotJSON, check_memory
from shardsave._format.file_names import DIRECTORY_INDEX, check_shard_count
from shardsave._format.header import MAX_HEADER_BYTES
from shardsave._format.index import (
    MAX_INDEX_BYTES,
    FileRecord,
    Index,
    Moment,
    Part,
    Record,
    ShardRecord,
    Superseded,
    encode_index,
)
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.packings import Packings, plan_shards, repack
from shardsave._saving.shards import PlannedShard
from shardsave._state.module import Entry, State
from shardsave._state.parts import Parts
from shardsave._version import __version__
from shardsave.errors import UnsupportedModuleError

#: Metadata of more bytes than this may need more memory than a reader accepts.
_LARGE_METADATA = 1_000_000

#: The most bytes that a character of a name needs in JSON.
_CHARACTER_BYTES = 6

#: No record of a file is longer as JSON.
_LONGEST_RECORD = ShardRecord(1 << 63, 1 << 31, (1 << 64) - 1)


class OtherFile(NamedTuple):
    """A file that another process writes: the bytes that it needs on disk, and those of its tensors."""

    reserved_bytes: int
    data_bytes: int


@dataclass(frozen=True)
class PlannedDirectory:
    """A part with a directory of its own, before it is written.

    ``role``: in the index. ``stem``: what the directory's name begins with. ``documents``: file → JSON. ``shards``: file → what is in
    it. ``index``: makes the directory's document from the records of all files. ``others``: the files that other processes write.
    """

    role: str
    stem: str
    documents: Mapping[str, bytes]
    shards: Mapping[str, PlannedShard]
    index: Callable[[Mapping[str, ShardRecord]], bytes]
    others: Mapping[str, OtherFile] = field(default_factory=dict)

    @property
    def longest_index(self) -> bytes:
        """The document as it will be, but for the numbers in it, none of which can be longer."""
        return self.index(dict.fromkeys([*self.documents, *self.shards, *self.others], _LONGEST_RECORD))


class Contents(NamedTuple):
    """Everything that one save will write into a directory.

    ``shards`` hold the weights, ``extra_shards`` (none or one) the extra tensors that ``documents`` refer to. ``documents``: role →
    content. ``companions``: file name → content. ``flags``: name on disk → frozen; None if the flags are unknown. ``module_flags``:
    name in the module → frozen; None if the names on disk are the same. ``single_file``: a second name for the first shard.
    ``copied_bytes``: of tensors that were copied in memory for this save. ``max_shard_size``: the most bytes of tensor data in a shard.
    ``directories``: the parts that have directories of their own, and ``directory_documents``: the most bytes of JSON in these.
    ``moment``: of a training.
    """

    state: State
    shards: Sequence[PlannedShard]
    extra_shards: Sequence[PlannedShard]
    documents: Mapping[str, bytes]
    companions: Mapping[str, bytes]
    flags: Mapping[str, bool] | None
    module_flags: Mapping[str, bool] | None
    metadata: Mapping[str, Any]
    single_file: str | None
    notes: tuple[str, ...]
    copied_bytes: int
    max_shard_size: int
    directories: Sequence[PlannedDirectory] = ()
    directory_documents: int = 0
    moment: Moment = Moment()

    @property
    def all_shards(self) -> list[PlannedShard]:
        """In the order in which they are written; without those that other processes write into directories."""
        in_directories = (shard for directory in self.directories for shard in directory.shards.values())
        return [*self.shards, *self.extra_shards, *in_directories]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data, those of all parts included."""
        return sum(shard.layout.data_bytes for shard in self.all_shards)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights alone, as `inspect` counts them."""
        return sum(shard.layout.data_bytes for shard in self.shards)

    @property
    def reserved_bytes(self) -> int:
        """The bytes that must be free on disk before anything is written."""
        documents = sum(map(len, self.documents.values())) + self.directory_documents
        others = sum(other.reserved_bytes for directory in self.directories for other in directory.others.values())
        return sum(shard.reserved_bytes for shard in self.all_shards) + documents + others

    @property
    def ties(self) -> dict[str, str]:
        """Tied name → the name under which the tensor is stored."""
        return {entry.name: entry.tied_to for entry in self.state.entries if entry.tied_to is not None}

    def with_sources(self, new: Mapping[int, ByteSource]) -> Contents:
        """The same contents with other sources of the same bytes. ``new``: `id` of a source → what takes its place."""
        stored = {entry.name: new.get(id(entry.source), entry.source) for entry in self.state.entries}
        entries = [
            Entry(name, kind, frozen, tied_to, stored[name if tied_to is None else tied_to])
            for name, kind, frozen, tied_to, _ in self.state.entries
        ]
        return self._replace(
            state=self.state._replace(entries=tuple(entries)),
            shards=[shard.with_sources(new) for shard in self.shards],
            extra_shards=[shard.with_sources(new) for shard in self.extra_shards],
            directories=[
                replace(directory, shards={name: shard.with_sources(new) for name, shard in directory.shards.items()})
                for directory in self.directories
            ],
        )

    def with_directories(self, directories: Sequence[PlannedDirectory]) -> Contents:
        """The same with these directories. Raises UnsupportedModuleError for a document in them that is longer than a reader accepts."""
        length = 0
        for directory in directories:
            for document in (*directory.documents.values(), directory.longest_index):
                _check_readable(directory.role, document)
                length += len(document)
        return self._replace(directories=directories, directory_documents=length)

    def keeping(self, kept: Sequence[PlannedShard]) -> Contents:
        """These contents with the shards ``kept``, whose tensors are those of the state, and all other tensors packed again.

        If some weights must be in a single file, a kept shard has exactly these, or none of them.
        """
        if not kept:
            return self
        first: list[PlannedShard] = []
        if self.single_file is not None:
            single = frozenset(self.shards[0].names)
            first = [next((shard for shard in kept if not single.isdisjoint(shard.names)), self.shards[0])]
            kept = [shard for shard in kept if shard not in first]
        place = {entry.name: number for number, entry in enumerate(self.state.entries)}
        repacked = repack(self.shards[len(first) :], kept, self.max_shard_size, place.__getitem__, self.state.file_metadata)
        return self._replace(shards=[*first, *repacked])

    def index_for(
        self,
        shard_names: Sequence[str],
        shards: Mapping[str, ShardRecord],
        parts: Mapping[str, Part],
        companions: Mapping[str, FileRecord],
        *,
        durable: bool,
        supersedes: Superseded | None,
        shared: Sequence[str] = (),
    ) -> Index:
        """The index, which names the shard of each tensor; tensors are in the order of the state.

        ``shared``: the shards that were taken over from an earlier checkpoint.
        """
        stored = [entry.name for entry in self.state.entries if entry.tied_to is None]
        weight_map = dict.fromkeys(stored, shard_names[0])
        for shard, shard_name in zip(self.shards[1:], shard_names[1:]):
            weight_map.update(dict.fromkeys([tensor.name for tensor in shard.layout.tensors], shard_name))
        record = Record(
            durable=durable,
            flags=self.flags,
            ties=self.ties,
            metadata=self.metadata,
            shards=shards,
            supersedes=supersedes,
            writer=f"shardsave {__version__}",
            parts=parts,
            companions=companions,
            module_flags=self.module_flags,
            moment=self.moment,
            shared=tuple(shared),
        )
        return Index(weight_map, self.weight_bytes, record)


def plan_contents(
    on_disk: OnDisk,
    parts: Parts,
    max_shard_size: int,
    metadata: Mapping[str, Any],
    *,
    directories: Sequence[PlannedDirectory] = (),
    moment: Moment | None = None,
    packings: Packings | None = None,
) -> Contents:
    """Packs what ``on_disk`` and ``parts`` hold into shards of at most ``max_shard_size`` bytes. ``packings``: as for `plan_shards`.

    Raises UnsupportedModuleError for a document that is longer than a reader accepts, ValueError for too many shards, and for an index
    that could not be read again.
    """
    for role, document in parts.documents.items():
        _check_readable(role, document)
    contents = _plan(on_disk, parts, max_shard_size, metadata, packings)
    contents = contents._replace(moment=moment or Moment()).with_directories(directories)
    _check_index(contents)
    return contents


def _plan(
    on_disk: OnDisk, parts: Parts, max_shard_size: int, metadata: Mapping[str, Any], packings: Packings | None
) -> Contents:
    state = on_disk.state
    shards = _plan_shards(on_disk, max_shard_size, packings)
    check_shard_count(len(shards))
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return Contents(
        state=state,
        shards=shards,
        extra_shards=plan_shards(parts.extra, None) if parts.extra else [],
        documents=parts.documents,
        companions=on_disk.companions,
        flags=flags if state.flags_known else None,
        module_flags=on_disk.module_flags,
        metadata=metadata,
        single_file=on_disk.single_file,
        notes=on_disk.notes,
        copied_bytes=on_disk.copied_bytes,
        max_shard_size=max_shard_size,
    )


def _check_readable(role: str, document: bytes) -> None:
    """Raises UnsupportedModuleError if a reader would refuse ``document`` because of its size."""
    if len(document) > MAX_HEADER_BYTES:
        raise UnsupportedModuleError(
            f"cannot save the {role}: at most {MAX_HEADER_BYTES} bytes were expected, since no more can be loaded, it has "
            f"{len(document)}; nothing was written"
        )
    try:
        check_memory(document)
    except NotJSON as refusal:
        raise UnsupportedModuleError(
            f"cannot save the {role}: {refusal.wanted}, since no more can be loaded, {refusal.found}; nothing was written"
        ) from None


def _check_index(contents: Contents) -> None:
    """Raises ValueError for an index that would be too large. Few are even near to that, so most are not encoded twice."""
    entries = contents.state.entries
    tied = [entry.tied_to for entry in entries if entry.tied_to is not None]
    names = [*(contents.module_flags or {}), *[entry.name for entry in entries], *tied]
    metadata_bytes = len(json.dumps([contents.metadata, dict(contents.moment.metrics)]))
    if metadata_bytes < _LARGE_METADATA and sum(map(len, names)) * _CHARACTER_BYTES + len(names) * 200 < MAX_INDEX_BYTES // 2:
        return
    shard, file = ShardRecord(1 << 60, MAX_HEADER_BYTES, (1 << 64) - 1), FileRecord(1 << 60, (1 << 64) - 1)
    shard_names = [f"model-{number:08x}-{number:05d}-of-{number:05d}.safetensors" for number in range(len(contents.shards))]
    roles = [*contents.documents, *(["extra tensors"] if contents.extra_shards else [])]
    roles += [part.role for part in contents.directories]
    companions = [*contents.companions, *([contents.single_file] if contents.single_file else [])]
    longest = contents.index_for(
        shard_names,
        dict.fromkeys(shard_names, shard),
        {role: Part(f"{role}-{0:08x}/{DIRECTORY_INDEX}", shard) for role in roles},
        dict.fromkeys(companions, file),
        durable=False,
        supersedes=Superseded(1 << 60, 1 << 63),
        shared=shard_names,
    )
    encode_index(longest)


def _plan_shards(on_disk: OnDisk, max_shard_size: int, packings: Packings | None) -> list[PlannedShard]:
    """The shards of the weights; if some must be in a single file, that is the first shard."""
    stored = [entry for entry in on_disk.state.entries if entry.tied_to is None]
    more = on_disk.state.file_metadata
    if on_disk.single_file is None:
        return plan_shards(stored, max_shard_size, more=more, packings=packings)
    names = on_disk.in_single_file
    together = [entry for entry in stored if names is None or entry.name in names]
    rest = [entry for entry in stored if names is not None and entry.name not in names]
    first = plan_shards(together, None, apart=False)
    return [*first, *(plan_shards(rest, max_shard_size, more=more) if rest else [])]
