"""`resume`: a model and a training state from a checkpoint, so that the training goes on as if it had never stopped."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.load_jobs import job_of_load
from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.model_load import ModelLoad, needed_files, no_tensor
from shardsave._api.operators import check_operators
from shardsave._api.resumed import Resumed
from shardsave._api.shared_memory import Filled, check_shared_memory
from shardsave._api.stored_training import stored_training
from shardsave._common.gc_pause import gc_paused
from shardsave._common.memory_errors import check_free_memory
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.spread import Spread
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import an, count, some
from shardsave._format.index import TRAINING
from shardsave._loading.freeze_flags import RestoredFlags
from shardsave._loading.job import LoadJob, opened
from shardsave._loading.read import Target, TensorReader
from shardsave._state.distributed_tensors import PartReader, is_distributed
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave._training.distributed import part_to_fill
from shardsave._training.places import RNG
from shardsave._training.read_values import UNCHANGED
from shardsave._training.restore import Options, RestorePlan, plan_restore
from shardsave._training.write_values import belongs_to_rank
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How many parameters whose flag has changed are named.
_MOST_NAMES = 10


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
            with _in_state(UNCHANGED):
                parts = (*parts, TRAINING) if asked.is_training else parts
                checkpoint = stack.enter_context(opened(job, os.fspath(path), wanted, parts))
            options = Options(rng, strict, only, skip or (), on_world_change, job.size, target_device, job.parts)
            resumption, _ = job.attempt(
                lambda: _Resumption(checkpoint, model, training, options, job, restore_frozen=restore_frozen)
            )
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


class _Resumption:
    """A resume from an open checkpoint. When it has been created, everything that can be refused has been refused; nothing is changed.

    ``model``: the load of the model, if there is one. ``notes``: of the training state; ``warnings``: of lack of memory.
    """

    @gc_paused()
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module | None,
        training: Any,
        options: Options,
        job: LoadJob,
        *,
        restore_frozen: bool,
    ) -> None:
        self.model: ModelLoad | None = None
        self.notes: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._checkpoint = checkpoint
        self._training = training
        self._job = job
        self._plan = self._plan_training(model, options) if training is not None or options.rng else None
        self._fresh, self._in_place = self._targets()
        if model is not None:
            strict, parts = options.strict, options.parts
            self.model = ModelLoad(
                model, checkpoint, None, options.device, strict=strict, restore_frozen=restore_frozen, parts=parts
            )
            self.warnings = self.model.warnings
            self._check_shared_memory()
        self._check_memory()

    @property
    def nbytes(self) -> int:
        """How many bytes of tensors are read."""
        of_model = self.model.nbytes if self.model is not None else 0
        return of_model + sum(_nbytes_here(located, into) for located, into in (*self._fresh, *self._in_place))

    def run(self, reader: TensorReader) -> Any:
        """Fills the model, hands every object its state, and sets the generators last. Returns the values."""
        plan = self._plan
        with _in_state(UNCHANGED):
            if plan is not None:
                self._read(reader, self._fresh)
                plan.check()
            self._job.checked()  # no rank changes anything that another one may still refuse
        if self.model is not None:
            with _in_state("the training state is unchanged" if plan is not None else ""):
                self.model.fill(reader)
            self.notes += (*_notes_on_flags(self.model.flags),)
        if plan is None:
            return self._training
        model = "the model is loaded, " if self.model is not None else ""
        with _in_state(f"{model}tensors in place in the training state are partly restored, no object has received its state"):
            plan.expect_writes()
            self._read(reader, self._in_place)
        with _in_state(model.removesuffix(", ")):
            values = plan.apply()
        self.notes += plan.notes
        return values

    def _read(self, reader: TensorReader, targets: Sequence[Target]) -> None:
        """Reads what the ranks share together, and what belongs to this one alone."""
        own = [target for target in targets if belongs_to_rank(target[0].name)]
        shared = [target for target in targets if not belongs_to_rank(target[0].name)] if own else targets
        reader.read_together(shared)
        if own:
            reader.read(own)

    def _plan_training(self, model: nn.Module | None, options: Options) -> RestorePlan:
        rank = options.parts.rank if options.parts is not None else 0
        stored = stored_training(self._checkpoint, "resume from", UNCHANGED, rank)
        if self._training is None:
            if stored.shared is not None:
                self.notes += ("training: it was saved, and was not asked for",)
            stored = stored._replace(shared=None)
        elif not options.rng and RNG.path in stored.leaves:
            self.notes += ("rng: the generators were saved, and were not asked for",)
        return plan_restore(self._training, model, stored, options)

    def _targets(self) -> tuple[list[Target], list[Target]]:
        """What is read into new tensors of the training state, and into those that exist."""
        if self._plan is None or self._checkpoint.training is None:
            return [], []
        tensors, parts = self._checkpoint.training.tensors, self._job.parts
        fresh: list[Target] = [(tensors[name], _part_here(name, tensor, parts)) for name, tensor in self._plan.fresh]
        return fresh, [(tensors[name], _part_here(name, tensor, parts)) for name, tensor in self._plan.in_place]

    def _check_shared_memory(self) -> None:
        if self.model is None or self._plan is None or self._checkpoint.training is None or not self._plan.filled:
            return
        tensors = self._checkpoint.training.tensors
        of_model = [Filled(*one) for one in self.model.filled()]
        check_shared_memory(of_model, [Filled(name, tensors[name], tensor) for name, tensor in self._plan.filled])

    def _check_memory(self) -> None:
        """Refuses what surely does not fit; the model alone has been checked."""
        if new := sum(_host_bytes(located, into) for located, into in self._fresh):
            needed = new + (self.model.host_bytes if self.model is not None else 0)
            lacking = check_free_memory(self._checkpoint.path, needed, UNCHANGED)
            self.notes += lacking
            self.warnings += lacking
        if self._plan is None and TRAINING in self._checkpoint.parts:
            self.notes += ("training: it was saved, and was not asked for",)


def _part_here(name: str, tensor: torch.Tensor, parts: PartReader | None) -> torch.Tensor | Spread:
    """``tensor``, which is filled from the stored tensor ``name``, or its part in this process."""
    return part_to_fill(name, tensor, parts).spread if parts is not None and is_distributed(tensor) else tensor


def _nbytes_here(located: Located, into: torch.Tensor | Spread | None) -> int:
    """The bytes of a stored tensor for which there is memory in this process."""
    return sum(chunk.tensor.nbytes for chunk in into.local) if isinstance(into, Spread) else located.nbytes


def _host_bytes(located: Located, into: torch.Tensor | Spread | None) -> int:
    """The bytes of a stored tensor for which there is memory of the host in this process."""
    if isinstance(into, Spread):
        return sum(chunk.tensor.nbytes for chunk in into.local if chunk.tensor.is_cpu)
    return located.nbytes if into is not None and into.is_cpu else 0


def _notes_on_flags(flags: RestoredFlags) -> Iterator[str]:
    """Names the parameters whose flag has changed: someone may have frozen or thawed them on purpose, before the resume."""
    for names, before, now in ((flags.now_frozen, "trainable", "frozen"), (flags.now_trainable, "frozen", "trainable")):
        if names:
            were, are, they = ("was", "is", "it was") if len(names) == 1 else ("were", "are", "they were")
            yield (
                f"flags: {count(len(names), 'parameter')} {were} {before} and {are} {now} now, as {they} saved: "
                f"{some(map(repr, names), _MOST_NAMES)}; restore_frozen=False keeps the flags of the model"
            )


@contextmanager
def _in_state(state: str) -> Iterator[None]:
    """Adds to our errors in which ``state`` things are; the error of another rank may say it already."""
    try:
        yield
    except ShardSaveError as error:
        if not state or str(error).endswith(state):
            raise
        raise type(error)(f"{error}; {state}") from error
