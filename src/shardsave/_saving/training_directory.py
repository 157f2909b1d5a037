"""Plans the directory of a training state: a document, and for each rank its own values and its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from shardsave._format.boxes import BOXES, StoredBox, encode_boxes
from shardsave._format.file_names import rank_document, rank_tensors
from shardsave._format.index import TRAINING, ShardRecord
from shardsave._format.training_state import TrainingIndex, encode_rank_document, encode_training_index
from shardsave._saving.contents import PlannedDirectory
from shardsave._saving.packings import plan_shards
from shardsave._saving.shards import PlannedShard
from shardsave._state.module import Entry


class DescribedTraining(NamedTuple):
    """The training state of one process as data. ``shared``: the JSON of what all ranks have in common, ``leaves`` of what belongs to this
    one; None if nothing does. ``shared_entries``, ``own_entries``: the tensors in them. ``has_distributed``: whether there is a tensor
    of which other ranks have parts."""

    shared: bytes
    leaves: bytes | None
    shared_entries: Sequence[Entry]
    own_entries: Sequence[Entry]
    has_distributed: bool = False


def plan_described(training: DescribedTraining, max_shard_size: int) -> PlannedDirectory:
    """The training state of the only process."""
    leaves = {0: training.leaves} if training.leaves is not None else {}
    entries = {0: [*training.shared_entries, *training.own_entries]}
    return plan_training_directory(training.shared, leaves, entries, max_shard_size)


def plan_training_directory(
    shared: bytes,
    leaves: Mapping[int, bytes],
    entries: Mapping[int, Sequence[Entry]],
    max_shard_size: int,
    *,
    ranks: int = 1,
    boxes: Mapping[str, StoredBox] | None = None,
    requires: tuple[str, ...] = (),
) -> PlannedDirectory:
    """Packs the tensors of a training state into files of at most ``max_shard_size`` bytes.

    ``shared``: the values that all ranks have in common, as JSON. ``leaves``: rank → its own values, a JSON object; ``entries``: rank
    → the tensors that it writes. Both may lack ranks. ``boxes``: which of the entries are boxes of tensors. ``requires``: what a reader
    must know, beside these.
    """
    shards = {
        rank_tensors(rank, number): _with_boxes(shard, boxes or {})
        for rank, tensors in entries.items()
        if tensors
        for number, shard in enumerate(plan_shards(tensors, max_shard_size), 1)
    }
    documents = {rank_document(rank): encode_rank_document(rank, values) for rank, values in leaves.items()}
    needed = tuple(dict.fromkeys([*requires, *([BOXES] if boxes else [])]))

    def index(files: Mapping[str, ShardRecord]) -> bytes:
        return encode_training_index(shared, TrainingIndex(ranks, files, needed))

    return PlannedDirectory(TRAINING, "training", documents, shards, index)


def _with_boxes(shard: PlannedShard, boxes: Mapping[str, StoredBox]) -> PlannedShard:
    """``shard`` with what its header has to say of ``boxes``."""
    own = {name: boxes[name] for name in shard.names if name in boxes} if boxes else {}
    return replace(shard, more=encode_boxes(own)) if own else shard
