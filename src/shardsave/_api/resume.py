"""`resume`: a model and a training state from a checkpoint, so that the training goes on as if it had never stopped."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.load_jobs import job_of_load
from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.model_load import needed_files, no_tensor
from shardsave._api.operators import check_operators
from shardsave._api.resumed import Resumed
from shardsave._api.resumption import Resumption, in_state
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import an
from shardsave._format.index import TRAINING
from shardsave._loading.job import opened
from shardsave._training.read_values import UNCHANGED
from shardsave._training.restore import Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
@verb()
def resume(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    training: Any = None,
    rng: bool = False,
    only: Collection[str] | None = None,
    skip: Collection[str] | None = None,
    strict: bool = True,
    on_world_change: Literal["fresh", "raise"] = "fresh",
    process_group: ProcessGroup | None = None,
    device: Device = None,
    restore_frozen: bool = True,
    verify: bool = True,
    rank_timeout: float = 120.0,
    phase_timeout: float = 1800.0,
    progress: ProgressArgument = None,
) -> Resumed:
    """Fills ``model`` and the objects in ``training`` from a checkpoint, and sets the random number generators.

    Optimizers find the state of a parameter by its name, in whatever groups it is now; no step is run. Objects, modules and tensors in
    ``training`` are filled where they are. Plain data is returned as it was saved. Everything that can be refused is refused before
    anything is changed, and a damaged state of an optimizer too: new tensors are read before the model is.

    Args:
        path: as in ``load``.
        model: as in ``load_model``; None: only the rest is restored. It gives the parameters of optimizers their names.
        training: structured as in ``save``; None: none of it is restored.
        rng: set the generators of Python, numpy and torch to their saved states, at the very end.
        only: restore only these parts of the training state, such as ``["optimizer", "schedulers/0", "rng"]``.
        skip: do not restore these parts.
        strict: raise if the model or the training state differs from what was saved; otherwise restore what fits, and name the rest.
        on_world_change: if another number of ranks saved the checkpoint, ``"raise"`` refuses it; ``"fresh"`` leaves what belongs to a rank
            (``PerRank``, ``rng``) as it is, and names it.
        process_group: of the ranks that train together.
        device, restore_frozen, verify, rank_timeout, phase_timeout, progress: as in ``load_model``.

    Collective:
        With a ``process_group``, or if ``model`` or ``training`` has a DTensor, all ranks of the group (without one: of the job) must make
        the call. Each fills its parts, from what any number of ranks saved; an error on one is raised on all.

    Returns:
        The step that was saved, the next one, the values of ``training``, notes, and the report of the load.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        IncompatibleCheckpointError: the checkpoint has no training state, or what was saved differs; nothing was changed. Or an object
            refuses its state; the message says what has been restored.
        CorruptCheckpointError: something is damaged; the message says what has been restored.
        OutOfMemoryError, CheckpointNotFoundError, UnsupportedTensorError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> training = {"optimizer": torch.optim.AdamW(model.parameters()), "epoch": 3}
        >>> report = shardsave.save(model, "run", training=training, rng=True, step=100)
        >>> training = {"optimizer": torch.optim.AdamW(model.parameters()), "epoch": 0}
        >>> resumed = shardsave.resume("run", model, training=training, rng=True)
        >>> resumed.next_step, resumed.values["epoch"]
        (101, 3)
    """
    clock = LoadClock()
    asked = _Asked(model, training, rng, only, skip, strict, on_world_change, device, restore_frozen, verify)
    with job_of_load(model, path, "resume from", process_group, rank_timeout, phase_timeout, training) as job:
        target_device, _ = job.attempt(lambda: asked.check(path, progress))
        job.check_equal(asked.everywhere_equal())
        wanted, parts = needed_files(model, "", None) if model is not None else (no_tensor, ())
        with ExitStack() as stack:
            with in_state(UNCHANGED):
                parts = (*parts, TRAINING) if asked.is_training else parts
                checkpoint = stack.enter_context(opened(job, os.fspath(path), wanted, parts))
            options = Options(rng, strict, only, skip or (), on_world_change, job.size, target_device, job.parts)
            resumption, lack_the_same = job.attempt(
                lambda: Resumption(checkpoint, model, training, options, job, restore_frozen=restore_frozen),
                Resumption.not_here,
            )
            if resumption.model is not None:
                resumption.model.agree_on_names(job, lack_the_same)
            clock.planned()
            shown = progress if job.leads or callable(progress) else False
            with Progress(shown, "loading", resumption.nbytes) as reporter:
                reader = job.reader(checkpoint, verify=verify, progress=reporter)
                values = resumption.run(reader)
            clock.transferred()
            notes = checkpoint.notes()
            step = checkpoint.moment.step
        report = clock.report(path, (), reader, job=job)
    report = (
        resumption.model.report(report, notes)
        if resumption.model is not None
        else replace(report, notes=(*report.notes, *notes))
    )
    if job.leads:
        logged = replace(report, notes=(*report.notes, *resumption.notes))
        log_load(logged, (*resumption.warnings, *notes), event="resume", may_be_empty=model is None, step=step)
    return Resumed(step, values, resumption.notes, report)


class _Asked(NamedTuple):
    """The arguments of `resume` that say what to restore."""

    model: nn.Module | None
    training: Any
    rng: bool
    only: Collection[str] | None
    skip: Collection[str] | None
    strict: bool
    on_world_change: str
    device: Device
    restore_frozen: bool
    verify: bool

    @property
    def is_training(self) -> bool:
        """Whether something of the training state is to be restored."""
        return self.training is not None or self.rng

    def check(self, path: str | os.PathLike[str], progress: ProgressArgument) -> torch.device | None:
        """Raises TypeError or ValueError. Returns the device."""
        check_path(path)
        check_progress(progress)
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be an nn.Module or None, not {an(type(self.model).__name__)}")
        check_switches(rng=self.rng, strict=self.strict, restore_frozen=self.restore_frozen, verify=self.verify)
        if self.on_world_change not in ("fresh", "raise"):
            raise ValueError(f"on_world_change must be 'fresh' or 'raise', not {self.on_world_change!r}")
        if not self.is_training and (self.only is not None or self.skip is not None):
            raise ValueError("only and skip name parts of a training state, pass training= or rng=True too")
        device = check_device(self.device)
        check_operators("resume from", path, UNCHANGED)
        return device

    def everywhere_equal(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        return {
            "training": "not given" if self.training is None else "given",
            "model": "not given" if self.model is None else "given",
            "rng": self.rng,
            "strict": self.strict,
            "restore_frozen": self.restore_frozen,
            "verify": self.verify,
        }
