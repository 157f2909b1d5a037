"""`save`: from a module to a committed checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

import torch

from shardsave._api.arguments import check_path, check_progress, check_reuse, check_switches, check_timeout, pick
from shardsave._api.operators import check_operators
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT, check_timeouts
from shardsave._api.reports import SaveReport, log_deletion
from shardsave._api.save_contents import Planned, What, attempted, plan
from shardsave._api.save_jobs import beside_other_ranks, check_digests, job_of_save
from shardsave._background.failures import take_failures
from shardsave._common.backend import engine_name
from shardsave._common.log_records import log_record
from shardsave._common.os_calls import absolute_path
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._saving.job import ALONE, Job
from shardsave._saving.write import UNWATCHED, Reuse, Watch, write_checkpoint
from shardsave._state.module import Source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._program.capture import Program


@uncompiled
def save(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: Union[int, str] = "2GB",
    durable: bool = True,
    metadata: Mapping[str, Any] | None = None,
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Any = None,
    rng: bool = False,
    process_group: ProcessGroup | None = None,
    architecture: bool = False,
    program: Program | None = None,
    adapter_only: bool = False,
    only: Literal["trainable"] | None = None,
    dtype: Union[torch.dtype, str, None] = None,
    reuse: Union[str, os.PathLike[str], Literal[False], None] = None,
    assume_frozen_unchanged: bool = False,
    recheck_every: int = 10,
    progress: ProgressArgument = None,
    lock_timeout: float = 600.0,
    rank_timeout: float = 120.0,
    phase_timeout: float = 1800.0,
    on_divergence: Literal["raise", "lowest_rank"] = "raise",
) -> SaveReport:
    """Saves a module, a sub-module, or a mapping from names to tensors as the checkpoint in ``directory``.

    Tensors keep their dtype and shape, parameters their ``requires_grad``; tied tensors are stored once. A checkpoint that is
    already there is replaced by one rename, or stays intact, whoever wrote it; other files in the directory are not touched.

    Args:
        source: an ``nn.Module``, with or without wrappers (``torch.compile``, DDP, DataParallel), or a mapping from names to
            tensors, Parameters or numpy arrays of any dtype of safetensors.
        directory: created if it does not exist.
        max_shard_size: the most bytes of tensor data in one file, as an int or ``"5GB"``, ``"500MB"``, ``"2GiB"``.
        durable: wait until the checkpoint would survive a loss of power; if False, it survives only the end of the process.
        metadata: name → JSON value, returned by ``inspect``; keys are strings on every level, tuples come back as lists.
        step: how many steps of a training were finished; returned by ``inspect``, with the time of the save.
        metrics: name → real number (also a numpy or torch scalar), for example ``{"loss": 0.25}``; returned by ``inspect``.
        training: also store a training state: a nested dict or list of what has ``state_dict`` and ``load_state_dict`` (optimizers,
            schedulers, averaged models, data loaders, …), tensors, arrays, numbers and text; ``PerRank`` marks what belongs to one rank.
            ``resume`` brings it back. A number under ``"epoch"`` is returned by ``inspect`` too.
        rng: also store the random generators of python, numpy, torch and every CUDA device.
        process_group: the group whose processes save one checkpoint together, each what it has: DTensors, stages of a pipeline, experts,
            or the same as the others. None: this process saves alone, unless there are DTensors; then all processes of the job save.
        architecture: also store the module tree as data, so that ``build_model`` builds the whole model again without calling its
            constructor. Anything that cannot be stored as data is refused; hooks are left out, with one warning.
        program: ``(args, kwargs)`` for ``forward``, or the result of ``torch.export.export``: also store what the model computes,
            as a graph of torch's operators that ``load_program`` runs without the model's classes.
        adapter_only: save only the active adapter of a PEFT model, in PEFT's layout, and the flags of the whole model.
        only: ``"trainable"`` saves the parameters that are not frozen, the buffers of their layers and running statistics, and the flags
            of the whole model: ``load_model(strict=False)`` puts them onto the rest, which comes from elsewhere.
        dtype: cast floating-point tensors to it on the way to disk, as ``convert`` does: a copy for inference. Tensors of 8 or 4 bits
            keep their dtype. The model in memory does not change.
        reuse: the directory of an earlier checkpoint. A shard of it whose tensors all have the same checksums now is not written again: it
            becomes a shard of the new checkpoint too, and takes no further space (a clone or a hard link; where neither is possible, it
            is written). None: the checkpoint that is replaced. False: write everything.
        assume_frozen_unchanged: do not even read parameters that were frozen at the last save of this process too, are the same objects
            in the same memory with the same version (``_version``), and are in no optimizer of ``training``. What torch does not
            notice (changes through ``.data``, numpy or a graph that is replayed) is then not saved.
        recheck_every: a shard is read back from the disk when this process takes it over for the first time, and then after this number
            of saves; a damaged one is written anew, and named in the report.
        progress: None shows a bar if the call takes long and stderr is a terminal; True or False forces or forbids the bar; a
            callable receives (bytes done, bytes in total).
        lock_timeout: seconds to wait for another save into the same directory.
        rank_timeout: in a collective save, the most seconds without a sign of life of another rank, and until all have made the call.
        phase_timeout: in a collective save, the most seconds for one phase of the call, though all ranks give signs of life.
        on_divergence: in a collective save, what to do if a tensor that several ranks hold is not the same on all: "raise", or save that
            of the "lowest_rank" and say so in the notes.

    Collective:
        With a ``process_group``, or with DTensors, all ranks of the group (without one: of the job) must make the call, with equal
        arguments. Otherwise one rank is to make it; ranks or groups that save into one directory apart from each other are told so. An
        error of one rank is raised on all. The files are those that one process with the whole model writes; no rank ever holds more of
        it than its own part and a bounded number of blocks. Rank 0 shows the bar, logs and warns, and ``reuse``, ``recheck_every`` and
        ``lock_timeout`` are those of rank 0.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UnsupportedTensorError: a tensor cannot be stored; nothing was written.
        UnsupportedTrainingError: the training state holds something that is no data and has no state; nothing was written.
        UnsupportedModuleError: the architecture or the program cannot be stored (all reasons are listed), or a module contains
            itself; nothing was written.
        DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, a previous checkpoint is intact.
        DurabilityUncertainError: the new checkpoint is in place, but may not survive a loss of power.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> report = shardsave.save(model, "linear-checkpoint")
        >>> report.tensors
        2
    """
    return save_now(source, directory, pick(What, locals()), pick(How, locals()))


@uncompiled
@verb()
def save_now(
    source: Source,
    directory: str | os.PathLike[str],
    what: What,
    how: How,
    before: Callable[[How], How] = lambda how: how,
) -> SaveReport:
    """As `save`. ``before``: called where this process leads, once all ranks have met; returns how to save."""
    started = time.perf_counter()
    with job_of(source, directory, what, how) as job:
        path, own = attempted(source, what, job, lambda: check_how(directory, how))
        job = beside_other_ranks(job, path, what.step)
        with job.for_all():
            how = before(how) if job.leads else how
        planned = plan(source, what, own, job)
        planned = settled(planned, how, job)
        report, warnings = write_planned(planned, os.fspath(directory), path, how, time.perf_counter() - started, job=job)
    if job.leads:
        log_saved(report, warnings)
        for warning in warnings:
            warn_caller(warning)
    return report


def job_of(
    source: Source, directory: str | os.PathLike[str], what: What, how: How, *, verb: str = "save to", apart: str = ""
) -> AbstractContextManager[Job]:
    """As `job_of_save`."""
    return job_of_save(
        source,
        directory,
        what.process_group,
        what.training,
        durable=how.durable,
        rank_timeout=how.rank_timeout,
        phase_timeout=how.phase_timeout,
        on_divergence=how.on_divergence,
        verb=verb,
        apart=apart,
    )


def settled(planned: Planned, how: How, job: Job) -> Planned:
    """``planned`` once it is known to be the same for all processes of ``job``, which then have what they have to write."""
    how_to_save = {"durable": how.durable, "on_divergence": how.on_divergence}
    check_digests(planned.contents, job, {**planned.options, **how_to_save})
    return planned._replace(contents=job.check_replicas(job.complete(planned.contents)))


class How(NamedTuple):
    """The arguments of `save` that say how to save. ``locked``: a manager's, called once the directory is locked; what it raises ends the
    save.
    """

    durable: bool
    progress: ProgressArgument
    lock_timeout: float
    reuse: Union[str, os.PathLike[str], Literal[False], None] = None
    recheck_every: int = 10
    rank_timeout: float = RANK_TIMEOUT
    phase_timeout: float = PHASE_TIMEOUT
    on_divergence: Literal["raise", "lowest_rank"] = "raise"
    locked: Callable[[], object] | None = None


def check_how(directory: str | os.PathLike[str], how: How) -> str:
    """Checks ``directory`` and ``how``; returns the absolute path. Raises TypeError or ValueError."""
    check_path(directory)
    check_operators("save to", directory, "nothing was written")
    check_values(how)
    return absolute_path(os.fspath(directory))


def check_values(how: How) -> None:
    """Raises TypeError or ValueError."""
    check_switches(durable=how.durable)
    check_progress(how.progress)
    check_timeout(how.lock_timeout)
    check_timeouts(how.rank_timeout, how.phase_timeout)
    if how.on_divergence not in ("raise", "lowest_rank"):
        raise ValueError(f"on_divergence must be 'raise' or 'lowest_rank', not {how.on_divergence!r}")
    check_reuse(how.reuse, how.recheck_every)


def write_planned(
    planned: Planned,
    shown: str,
    path: str,
    how: How,
    plan_seconds: float,
    watch: Watch = UNWATCHED,
    job: Job = ALONE,
) -> tuple[SaveReport, tuple[str, ...]]:
    """Writes what was planned into the directory ``path``. Returns the report, and what the caller must be warned of.

    ``shown``: the path in the report. ``plan_seconds``: how long the plan took. Raises what `save` raises.
    """
    contents, started = planned.contents, time.perf_counter()
    earlier = absolute_path(os.fspath(how.reuse)) if how.reuse else None
    reuse = Reuse(earlier, how.recheck_every, planned.frozen) if how.reuse is not False else None
    progress = how.progress if job.leads or callable(how.progress) else False
    with Progress(progress, "saving", contents.tensor_bytes) as reporter:
        outcome = write_checkpoint(
            contents,
            path,
            durable=how.durable,
            lock_timeout=how.lock_timeout,
            progress=reporter,
            watch=watch,
            reuse=reuse,
            job=job,
            locked=how.locked,
        )
    seconds = plan_seconds + time.perf_counter() - started
    report = SaveReport(
        path=shown,
        bytes=contents.weight_bytes,
        tensors=outcome.tensors,
        shards=outcome.shards,
        seconds=seconds,
        phases=replace(outcome.phases, plan=plan_seconds + outcome.phases.plan),
        engine=engine_name(),
        direct=outcome.totals.direct,
        staging_bytes=outcome.totals.staging_bytes,
        pinned=outcome.totals.pinned,
        notes=(*outcome.notes, *take_failures()),
        durable=how.durable,
        removed=outcome.removed,
        leftovers=outcome.leftovers,
        overlaps=contents.state.overlaps,
        trust=planned.needed.trust,
        script_classes=planned.needed.script_classes,
        cast=planned.cast,
        left_out=planned.left_out,
        training_bytes=outcome.directory_bytes,
        bytes_written=outcome.bytes_written,
        bytes_reused=outcome.bytes_reused,
        reused=outcome.taken,
        step=contents.moment.step,
        ranks=job.size,
        stall_seconds=seconds,
        durable_seconds=seconds,
    )
    return report, (*planned.warnings, *outcome.warnings)


def log_saved(report: SaveReport, warnings: tuple[str, ...]) -> None:
    """Logs a save, and what it removed."""
    log_record("save", report, matters=bool(report.leftovers or warnings))
    log_deletion(report.path, report.removed, report.leftovers)
