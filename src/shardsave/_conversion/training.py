"""The training state of a conversion's source, and the same as a part of the new checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shardsave._common.sources import TensorSource
from shardsave._format.boxes import StoredBox
from shardsave._format.file_names import RANK_TENSORS
from shardsave._loading.mapped import Maps
from shardsave._saving.contents import PlannedDirectory
from shardsave._saving.training_directory import plan_training_directory
from shardsave._state.module import Entry
from shardsave._storage.training import TrainingFiles


class TrainingState(NamedTuple):
    """A training state: values that all ranks share, rank → its own values, and rank → the tensors that it wrote; which of these are
    ``boxes`` of tensors, and what readers must know."""

    ranks: int
    shared: Any
    leaves: Mapping[int, Mapping[str, Any]]
    entries: Mapping[int, Sequence[Entry]]
    boxes: Mapping[str, StoredBox]
    requires: tuple[str, ...]


def training_of(files: TrainingFiles, maps: Maps) -> TrainingState:
    """The training state in ``files``, whose tensors are mapped by ``maps``."""
    tensors = maps.tensors(files.stored)
    entries: defaultdict[int, list[Entry]] = defaultdict(list)
    for name, located in files.stored.items():
        match = RANK_TENSORS.fullmatch(located.shard.rpartition("/")[2])
        assert match is not None, "only such files are opened"
        entries[int(match[1])].append(Entry(name, "tensor", None, None, TensorSource.of(tensors[name])))
    return TrainingState(files.ranks, files.shared, files.leaves, entries, files.boxes, files.requires)


def plan_training(training: TrainingState, max_shard_size: int) -> PlannedDirectory:
    """``training`` as a part of a new checkpoint, in files of at most ``max_shard_size`` bytes."""
    shared = json.dumps(training.shared).encode()
    leaves = {rank: json.dumps(values).encode() for rank, values in training.leaves.items()}
    return plan_training_directory(
        shared,
        leaves,
        training.entries,
        max_shard_size,
        ranks=training.ranks,
        boxes=training.boxes,
        requires=training.requires,
    )
