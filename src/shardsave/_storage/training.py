"""The training state of an open checkpoint: its document, the documents of its ranks, and the place of every tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from shardsave._common.strict_json import glimpse
from shardsave._format.file_names import RANK_DOCUMENT, is_in_directory
from shardsave._format.index import Part
from shardsave._format.training_state import parse_rank_document, parse_training_index
from shardsave._storage.located import Located, located
from shardsave._storage.shard_files import Broken, ShardFiles
from shardsave.errors import CorruptCheckpointError, ShardSaveError


class TrainingFiles(NamedTuple):
    """What the directory of a training state holds. ``files``: its files beside the document, relative to the checkpoint's directory."""

    document: bytes
    rank_documents: Mapping[int, bytes]
    tensors: Mapping[str, Located]
    files: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Everything in it but its tensors: values that all ranks share, and by rank those of each."""
        _, members = parse_training_index(self.document, "the training state")
        leaves = {
            f"rank {rank}": parse_rank_document(document, rank, f"rank {rank}")["leaves"]
            for rank, document in self.rank_documents.items()
        }
        return {"ranks": members["ranks"], "shared": members["shared"], **leaves}


def open_training(checkpoint: ShardFiles, part: Part, broken: Broken) -> TrainingFiles:
    """Opens all files of the training state whose document is ``part``.

    With ``broken``, a file that cannot be opened is left out, and its error is put there. Raises CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError, ShardSaveError.
    """
    document = checkpoint.read_document(part.file)
    index, _ = parse_training_index(document, f"part {part.file}")
    folder = os.path.dirname(part.file)
    assert checkpoint.records is not None
    checkpoint.records.update((f"{folder}/{name}", record) for name, record in index.files.items())
    rank_documents: dict[int, bytes] = {}
    tensors: dict[str, Located] = {}
    for name in index.files:
        file = f"{folder}/{name}"
        try:
            match = RANK_DOCUMENT.fullmatch(name)
            if match is not None:
                rank_documents[int(match[1])] = _rank_document(checkpoint, file, int(match[1]))
            else:
                _note_tensors(checkpoint, file, tensors)
        except ShardSaveError as error:
            if broken is None:
                raise
            checkpoint.drop(file)
            broken[file] = error
    return TrainingFiles(document, rank_documents, tensors, tuple(f"{folder}/{name}" for name in index.files))


def _rank_document(checkpoint: ShardFiles, file: str, rank: int) -> bytes:
    document = checkpoint.read_document(file)
    parse_rank_document(document, rank, f"part {file}")
    return document


def _note_tensors(checkpoint: ShardFiles, file: str, tensors: dict[str, Located]) -> None:
    opened, header = checkpoint.open_shard(file)
    checkpoint.hold(file, opened)
    repeated = next((name for name in header.tensors.names if name in tensors), None)
    if repeated is not None:
        raise CorruptCheckpointError(
            f"corrupt shard {file}: names that no other file of the training state has were expected, {glimpse(repeated)} is also in "
            f"{tensors[repeated].shard}; nothing else of the training state was read"
        )
    tensors.update(located(file, header))


def bytes_in(folder: str) -> int:
    """The length of all files of a part in its directory, as far as they can be seen; nothing is opened."""
    total = 0
    with suppress(OSError), os.scandir(folder) as listed:
        for entry in listed:
            with suppress(OSError):
                if is_in_directory(entry.name) and entry.is_file():
                    total += entry.stat().st_size
    return total
