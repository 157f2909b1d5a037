"""The training state of an open checkpoint, as `_training` reads it."""

from __future__ import annotations

from shardsave._format.training_state import parse_rank_document, parse_training_index
from shardsave._storage.checkpoint import Checkpoint
from shardsave._training.restore import StoredTraining
from shardsave.errors import IncompatibleCheckpointError

#: The number of this process among those that train together: there is one.
RANK = 0


def stored_training(checkpoint: Checkpoint, purpose: str, state: str) -> StoredTraining:
    """What ``checkpoint``, opened with the part, has for this rank. ``purpose``, ``state``: for the message, as in `check_operators`.

    Raises IncompatibleCheckpointError if it has no training state.
    """
    training = checkpoint.training
    if training is None:
        raise IncompatibleCheckpointError(
            f"cannot {purpose} {checkpoint.path}: a training state was expected, the checkpoint has none: it was saved without "
            f"training= and rng=; {state}"
        )
    index, members = parse_training_index(training.document, "the training state")
    document = training.rank_documents.get(RANK)
    leaves = parse_rank_document(document, RANK, f"rank {RANK}")["leaves"] if document is not None else {}
    return StoredTraining(checkpoint.path, members["shared"], leaves, training.tensors, index.ranks)
