"""Background saves without the public verb: staged in the call, written on a thread that a gate may hold back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

import shardsave
from shardsave._api.save_contents import What, plan, read_own
from shardsave._background.staged_contents import StagedContents
from shardsave._background.staging import Wanted, stage
from shardsave._common.progress import Progress
from shardsave._common.sources import ByteSource
from shardsave._saving.write import write_checkpoint
from support import same_bits


class Save:
    """One save in flight. It reads no tensor before ``gate`` is set; ``late``: nor does it say before that it is about to read.

    ``error``: what has ended it.
    """

    def __init__(self, staging: StagedContents, folder: Path, late: bool) -> None:
        self.staging = staging
        self.gate = threading.Event()
        self._late = late
        self.error: BaseException | None = None
        self.workers = 1
        self.read: list[int] = []  # the sources, by id, in the order in which they were given to the engine
        self._folder = folder
        self.contents = staging.contents
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.staging.arm()
        self._thread.start()

    def wait(self) -> None:
        """Lets the save read; returns when it has ended, and raises what it has raised."""
        self.gate.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the save hangs"
        assert self.staging.staged.is_set()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.staging.use_streams()
            with Progress(False, "saving", self.contents.tensor_bytes) as progress:
                write_checkpoint(self.contents, self._folder, durable=False, lock_timeout=10, progress=progress, watch=self)
        except BaseException as error:
            self.error = error
        finally:
            self.staging.finish()

    def check(self) -> None:
        self.staging.check()

    def attempt_commit(self) -> None:
        self.staging.check_complete()

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        return self.staging.is_urgent(pieces)

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        if self._late:
            self.gate.wait(60)
        self.read = [id(piece) for piece in pieces]
        taken = self.staging.begin_reading(pieces)
        while not self.gate.wait(0.01):
            self.staging.check()
        return taken

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        self.staging.end_reading(pieces, sums)


def save_behind(
    source: nn.Module | Mapping[str, Any],
    folder: Path,
    optimizers: Sequence[Optimizer] = (),
    staging: Wanted = "auto",
    *,
    more: Any = None,
    check_unchanged: bool = False,
    step_timeout: float = 60.0,
    late: bool = False,
) -> Save:
    """Starts a save that reads nothing before `Save.wait` or `opened_by_a_step`. ``more``: what is saved beside the optimizers."""
    staged = staged_only(source, optimizers, staging, more, check_unchanged=check_unchanged, step_timeout=step_timeout)
    save = Save(staged, folder, late)
    save.start()
    return save


def staged_only(
    source: nn.Module | Mapping[str, Any],
    optimizers: Sequence[Optimizer] = (),
    staging: Wanted = "auto",
    more: Any = None,
    *,
    check_unchanged: bool = False,
    step_timeout: float = 60.0,
) -> StagedContents:
    """What the call alone does. The result has to be finished."""
    what = What(
        max_shard_size="2GB",
        metadata=None,
        step=None,
        metrics=None,
        training=training_of(optimizers, more),
        rng=False,
        process_group=None,
        architecture=False,
        program=None,
        adapter_only=False,
        only=None,
        dtype=None,
    )
    contents = plan(source, what, read_own(source, what, None)).contents
    return stage(contents, source, optimizers, staging, check_unchanged=check_unchanged, workers=1, step_timeout=step_timeout)


def training_of(optimizers: Sequence[Optimizer], more: Any) -> Any:
    return {"optimizers": list(optimizers), "more": more} if optimizers or more is not None else None


@contextmanager
def opened_by_a_step(save: Save, seconds: float = 0.03) -> Iterator[list[threading.Timer]]:
    """Opens the gate a while after a step has asked whether it may go on: what it would change, if it did, is read after that.

    Yields one timer for each time that a step has asked.
    """
    timers: list[threading.Timer] = []
    before_step = save.staging._drain.before_step

    def open_and_ask(optimizer: Optimizer) -> None:
        timers.append(threading.Timer(seconds, save.gate.set))
        timers[-1].start()
        before_step(optimizer)

    save.staging._drain.before_step = open_and_ask  # type: ignore[method-assign]
    yield timers
    for timer in timers:
        timer.join()


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint: the weights, and those of the training state by their names there."""
    tensors: dict[str, torch.Tensor] = dict(shardsave.load(folder))
    for path in sorted(folder.glob("training-*/*.safetensors")):
        tensors.update({f"training/{name}": value for name, value in load_file(path).items()})
    return tensors


def assert_same_tensors(folder: Path, expected: Path) -> None:
    """Two checkpoints have the same tensors, bit for bit."""
    found, wanted = stored_in(folder), stored_in(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def hooks() -> int:
    """How many hooks torch calls before every step."""
    return len(torch_optimizer._global_optimizer_pre_hooks)
