"""The training state of an open checkpoint: its document, the documents of its ranks, and the place of every tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from shardsave._common.strict_json import glimpse
from shardsave._format.boxes import BOXES, StoredBox, parse_boxes
from shardsave._format.file_names import RANK_DOCUMENT, is_in_directory
from shardsave._format.index import Part
from shardsave._format.training_state import parse_rank_document, parse_training_index
from shardsave._storage.boxes import assemble
from shardsave._storage.located import Located, located
from shardsave._storage.shard_files import Broken, ShardFiles
from shardsave.errors import CorruptCheckpointError, ShardSaveError


class TrainingFiles(NamedTuple):
    """What the directory of a training state holds.

    ``ranks``: how many saved it. ``shared``: the JSON of what all ranks have in common. ``leaves``: rank → key → the JSON of its own
    values. ``tensors``: those that the values name. ``files``: its files beside the document, relative to the checkpoint's directory.
    ``stored``: what these files hold, by stored name; ``boxes``: which of it is a box of a tensor. ``requires``: as in `TrainingIndex`.
    """

    ranks: int
    shared: Any
    leaves: Mapping[int, Mapping[str, Any]]
    tensors: Mapping[str, Located]
    files: tuple[str, ...]
    stored: Mapping[str, Located]
    boxes: Mapping[str, StoredBox]
    requires: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Everything in it but its tensors: values that all ranks share, and by rank those of each."""
        return {"ranks": self.ranks, "shared": self.shared, **{f"rank {rank}": own for rank, own in self.leaves.items()}}


def open_training(checkpoint: ShardFiles, part: Part, broken: Broken) -> TrainingFiles:
    """Opens all files of the training state whose document is ``part``.

    With ``broken``, a file that cannot be opened is left out, and its error is put there. Raises CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError, ShardSaveError.
    """
    index, members = parse_training_index(checkpoint.read_document(part.file), f"part {part.file}")
    folder = os.path.dirname(part.file)
    assert checkpoint.records is not None
    checkpoint.records.update((f"{folder}/{name}", record) for name, record in index.files.items())
    leaves: dict[int, Mapping[str, Any]] = {}
    stored: dict[str, Located] = {}
    boxes: dict[str, StoredBox] = {}
    for name in index.files:
        file = f"{folder}/{name}"
        try:
            match = RANK_DOCUMENT.fullmatch(name)
            if match is not None:
                rank = int(match[1])
                leaves[rank] = parse_rank_document(checkpoint.read_document(file), rank, f"part {file}")["leaves"]
            else:
                boxes.update(_note_tensors(checkpoint, file, stored, has_boxes=BOXES in index.requires))
        except ShardSaveError as error:
            if broken is None:
                raise
            checkpoint.drop(file)
            broken[file] = error
    files = tuple(f"{folder}/{name}" for name in index.files)
    tensors = _tensors(checkpoint.path, stored, boxes, broken, part.file)
    return TrainingFiles(index.ranks, members["shared"], leaves, tensors, files, stored, boxes, index.requires)


def _tensors(
    folder: str, stored: dict[str, Located], boxes: Mapping[str, StoredBox], broken: Broken, document: str
) -> Mapping[str, Located]:
    """The tensors that ``stored`` make up. With ``broken``, each box counts as a tensor if they do not."""
    if not boxes:
        return stored
    try:
        if not broken:
            return assemble(folder, stored, boxes)
    except ShardSaveError as error:
        if broken is None:
            raise
        broken[document] = error
    return stored


def _note_tensors(checkpoint: ShardFiles, file: str, tensors: dict[str, Located], *, has_boxes: bool) -> dict[str, StoredBox]:
    """Adds the tensors of ``file``. Returns which of them are boxes; none are, unless a file may have some."""
    opened, header = checkpoint.open_shard(file)
    checkpoint.hold(file, opened)
    if not tensors.keys().isdisjoint(header.tensors.names):
        repeated = next(name for name in header.tensors.names if name in tensors)
        raise CorruptCheckpointError(
            f"corrupt shard {file}: names that no other file of the training state has were expected, {glimpse(repeated)} is also in "
            f"{tensors[repeated].shard}; nothing else of the training state was read"
        )
    boxes = parse_boxes(header, f"shard {file}") if has_boxes else {}
    tensors.update(located(file, header))
    return boxes


def bytes_in(folder: str) -> int:
    """The length of all files of a part in its directory, as far as they can be seen; nothing is opened."""
    total = 0
    with suppress(OSError), os.scandir(folder) as listed:
        for entry in listed:
            with suppress(OSError):
                if is_in_directory(entry.name) and entry.is_file():
                    total += entry.stat().st_size
    return total
