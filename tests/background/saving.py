"""Background saves without the public verb: staged in the call, written on a thread that a gate may hold back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import shardsave
from shardsave._api.save_contents import What, plan
from shardsave._background.staging import Staging, Wanted, stage
from shardsave._common.progress import Progress
from shardsave._common.sources import ByteSource
from shardsave._saving.write import write_checkpoint


class Save:
    """One save in flight. It reads nothing before ``gate`` is set. ``error``: what has ended it."""

    def __init__(self, staging: Staging, folder: Path, gate: threading.Event) -> None:
        self.staging = staging
        self.gate = gate
        self.error: BaseException | None = None
        self.workers = 1
        self._folder = folder
        self._contents = staging.contents
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.staging.arm()
        self._thread.start()

    def wait(self) -> None:
        """Lets the save read; returns when it has ended, and raises what it has raised."""
        self.gate.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the save hangs"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.staging.use_streams()
            with Progress(False, "saving", self._contents.tensor_bytes) as progress:
                write_checkpoint(self._contents, self._folder, durable=False, lock_timeout=10, progress=progress, watch=self)
        except BaseException as error:
            self.error = error
        finally:
            self.staging.finish()

    def check(self) -> None:
        self.staging.check()

    def attempt_commit(self) -> None:
        self.staging.check_complete()

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        taken = self.staging.begin_reading(pieces)
        while not self.gate.wait(0.01):
            self.staging.check()
        return taken

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        self.staging.end_reading(pieces, sums)


def save_behind(
    source: nn.Module | Mapping[str, Any],
    folder: Path,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    staging: Wanted = "auto",
    *,
    gate: threading.Event | None = None,
    training: Any = None,
    check_unchanged: bool = False,
    step_timeout: float = 60.0,
) -> Save:
    """Starts a save that reads nothing before ``gate`` (none: before `Save.wait`). ``training``: what else is saved."""
    training = {"optimizers": list(optimizers), "more": training} if optimizers or training is not None else None
    what = What("2GB", None, None, None, training, False, None, False, None, False, None, None)
    contents = plan(source, what).contents
    staged = stage(contents, source, optimizers, staging, check_unchanged=check_unchanged, workers=1, step_timeout=step_timeout)
    save = Save(staged, folder, gate or threading.Event())
    save.start()
    return save


def open_after(gate: threading.Event, seconds: float = 0.1) -> None:
    """Sets ``gate`` a little later, so that a step that ought to wait meanwhile would be found out if it did not."""
    threading.Timer(seconds, gate.set).start()


def everything_in(folder: Path) -> dict[str, torch.Tensor]:
    """All stored tensors: the weights, and those of the training state by their names there."""
    index = folder / "model.safetensors.index.json"
    assert index.exists()
    tensors = dict(shardsave.load(folder))
    from safetensors.torch import load_file

    for path in sorted(folder.glob("training-*/*.safetensors")):
        tensors.update({f"training/{name}": value for name, value in load_file(path).items()})
    return tensors


def training_copy(*values: Any) -> list[Any]:
    return [copy.deepcopy(value) for value in values]
