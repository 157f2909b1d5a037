"""Writes a described training state into files and restores from them, as a verb does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import shardsave
from shardsave._common.progress import Progress
from shardsave._common.strict_json import parse_object
from shardsave._loading.read import TensorReader
from shardsave._storage.checkpoint import open_checkpoint
from shardsave._training.describe import TrainingState, describe
from shardsave._training.restore import Options, RestorePlan, StoredTraining, plan_restore


def keep(folder: Path, training: Any, model: Any = None, *, rng: bool = False, rank: int = 0, ranks: int = 1) -> TrainingState:
    """Describes ``training`` and writes it into ``folder``."""
    state = describe(training, model, rng=rng, rank=rank)
    shardsave.save({entry.name: entry.tensor for entry in state.entries}, folder / "tensors", durable=False)
    document = {"shared": state.shared, "leaves": state.leaves, "ranks": ranks}
    (folder / "document.json").write_text(json.dumps(document, allow_nan=False))
    return state


class Resumption:
    """A restore from ``folder`` in its two phases. ``document``: used instead of the one in the folder."""

    def __init__(self, folder: Path, training: Any, model: Any = None, *, document: Any = None, **options: Any) -> None:
        self._checkpoint = open_checkpoint(folder / "tensors")
        document = parse_object((folder / "document.json").read_bytes()) if document is None else document
        stored = StoredTraining(
            str(folder), document["shared"], document["leaves"], self._checkpoint.tensors, document.get("ranks", 1)
        )
        self.plan: RestorePlan = plan_restore(training, model, stored, Options(**options))

    def read(self) -> None:
        with self._checkpoint as checkpoint, Progress(False, "loading", 0) as progress:
            reader = TensorReader(checkpoint, verify=True, progress=progress)
            reader.read([(checkpoint.tensors[name], tensor) for name, tensor in [*self.plan.fresh, *self.plan.in_place]])

    def finish(self) -> Any:
        self.read()
        self.plan.check()
        return self.plan.apply()


def restore(folder: Path, training: Any, model: Any = None, **options: Any) -> tuple[Any, tuple[str, ...]]:
    """Restores from ``folder``. Returns the values and the notes."""
    resumption = Resumption(folder, training, model, **options)
    values = resumption.finish()
    return values, resumption.plan.notes
