"""The training state of an open checkpoint, as `_training` reads it."""

from __future__ import annotations

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
    return StoredTraining(checkpoint.path, training.shared, training.leaves.get(RANK, {}), training.tensors, training.ranks)
