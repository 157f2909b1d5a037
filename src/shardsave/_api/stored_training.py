"""The training state of an open checkpoint, as `_training` reads it."""

from __future__ import annotations

from shardsave._format.boxes import BOXES
from shardsave._storage.checkpoint import Checkpoint
from shardsave._training.restore import StoredTraining
from shardsave.errors import IncompatibleCheckpointError


def stored_training(checkpoint: Checkpoint, purpose: str, state: str, rank: int = 0) -> StoredTraining:
    """What ``checkpoint``, opened with the part, has for ``rank``. ``purpose``, ``state``: for the message, as in `check_operators`.

    Raises IncompatibleCheckpointError if it has no training state.
    """
    training = checkpoint.training
    if training is None:
        raise IncompatibleCheckpointError(
            f"cannot {purpose} {checkpoint.path}: a training state was expected, the checkpoint has none: it was saved without "
            f"training= and rng=; {state}"
        )
    leaves = training.leaves.get(rank, {})
    has_placements = BOXES in training.requires
    return StoredTraining(checkpoint.path, training.shared, leaves, training.tensors, training.ranks, has_placements)
