"""Everything that one save will write, planned before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardsave._format.file_names import check_shard_count
from shardsave._format.header import MAX_HEADER_BYTES
from shardsave._format.index import Index, Record
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.shards import PlannedShard, plan_shards
from shardsave._state.module import State
from shardsave._state.parts import Parts
from shardsave.errors import UnsupportedModuleError


class Contents(NamedTuple):
    """The planned content of a checkpoint directory.

    ``shards`` hold the weights, ``extra_shards`` the extra tensors of ``documents`` (none or one shard); ``documents`` are by role,
    ``companions`` by file name. ``flags`` (name on disk → frozen) is None where the flags are unknown, ``module_flags`` where the
    names on disk are those of the module. ``single_file``: a second name for the only shard.
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

    @property
    def all_shards(self) -> list[PlannedShard]:
        return [*self.shards, *self.extra_shards]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data, extra tensors included."""
        return sum(shard.layout.data_bytes for shard in self.all_shards)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that must be free on disk before anything is written."""
        return sum(shard.reserved_bytes for shard in self.all_shards) + sum(map(len, self.documents.values()))

    @property
    def ties(self) -> dict[str, str]:
        """Tied name → the name under which the tensor is stored."""
        return {entry.name: entry.tied_to for entry in self.state.entries if entry.tied_to is not None}

    def index_for(self, shard_names: Sequence[str], record: Record) -> Index:
        """The index that names each tensor's shard, in state order."""
        shard_of = {tensor.name: name for shard, name in zip(self.shards, shard_names) for tensor in shard.layout.tensors}
        weight_map = {entry.name: shard_of[entry.name] for entry in self.state.entries if entry.tied_to is None}
        return Index(weight_map, sum(shard.layout.data_bytes for shard in self.shards), record)


def plan_contents(on_disk: OnDisk, parts: Parts, max_shard_size: int, metadata: Mapping[str, Any]) -> Contents:
    """Packs what ``on_disk`` and ``parts`` hold into shards of at most ``max_shard_size`` bytes.

    Raises UnsupportedModuleError for a document that is too long to be read again, ValueError for too many shards.
    """
    for role, document in parts.documents.items():
        if len(document) > MAX_HEADER_BYTES:
            raise UnsupportedModuleError(
                f"cannot save the {role}: at most {MAX_HEADER_BYTES} bytes of it are read again, it has {len(document)}; "
                "nothing was written"
            )
    state = on_disk.state
    stored = [entry for entry in state.entries if entry.tied_to is None]
    bound = max_shard_size if on_disk.single_file is None else sys.maxsize
    shards = plan_shards(stored, bound, apart=on_disk.single_file is None)
    check_shard_count(len(shards))
    flags = {entry.name: entry.frozen for entry in state.entries if entry.frozen is not None}
    return Contents(
        state=state,
        shards=shards,
        extra_shards=plan_shards(parts.extra, sys.maxsize) if parts.extra else [],
        documents=parts.documents,
        companions=on_disk.companions,
        flags=flags if state.flags_known else None,
        module_flags=on_disk.module_flags,
        metadata=metadata,
        single_file=on_disk.single_file,
        notes=on_disk.notes,
    )
