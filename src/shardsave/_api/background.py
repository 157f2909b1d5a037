"""How a save is started in the background: for `save_async`, and for a manager."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from shardsave._api.arguments import check_switches, check_timeout
from shardsave._api.pending_save import PendingSave
from shardsave._api.process_group import collective_group
from shardsave._api.reports import Phases, SaveReport
from shardsave._api.save import How, check_how, job_of, log_saved, settled, write_planned
from shardsave._api.save_contents import Planned, What, attempted, plan
from shardsave._api.save_jobs import beside_other_ranks, leader_is_busy
from shardsave._background.flight import Flight
from shardsave._background.staged_contents import StagedContents
from shardsave._background.staging import stage
from shardsave._background.turns import IfBusy, in_flight, take_turn
from shardsave._common.backend import engine_name
from shardsave._common.imports import import_at_use
from shardsave._common.shutdown import verb
from shardsave._common.warn_caller import warnings_collected
from shardsave._saving.job import Job
from shardsave._state.module import Source
from shardsave.errors import DirectoryBusyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch.distributed import ProcessGroup

    from shardsave._common.sources import ByteSource
    from shardsave._saving.contents import Contents

StagingArgument = Literal["auto", "snapshot", "ring"]


class InBackground(NamedTuple):
    """The arguments of `save_async` that say how to save in the background."""

    staging: StagingArgument
    if_busy: IfBusy
    check_unchanged: bool
    background_workers: int
    step_timeout: float


class Around(NamedTuple):
    """What else is done for a save. ``before``: called in the call, where this process leads, when it is this save's turn; returns how to
    save. ``write``: called on the saving thread with the function that saves; it returns the report.
    """

    before: Callable[[How], How] = lambda how: how
    write: Callable[[Callable[[], SaveReport]], SaveReport] = lambda save: save()


#: A save for which nothing else is done.
ALONE = Around()


class Started(NamedTuple):
    """When the call began, as `time.perf_counter` counts, and how long it waited for an earlier save, and planned, in seconds.

    ``notes``: what the caller would be warned of otherwise.
    """

    at: float
    queue_seconds: float
    plan_seconds: float
    notes: tuple[str, ...]


def start(
    source: Source,
    directory: str | os.PathLike[str],
    what: What,
    how: How,
    background: InBackground,
    around: Around = ALONE,
) -> PendingSave:
    """Plans a save, takes or guards its tensors, and lets the rest go on in the background. Raises what `save_async` raises.

    An interrupt, at whatever moment, ends what was started.
    """
    started = time.perf_counter()
    group = collective_group(source, what.process_group, what.training)
    path = "" if group is not None else _checked_path(directory, how, background)
    flight: Flight[SaveReport] = Flight(os.fspath(directory))
    try:
        with verb(), ExitStack() as ending:
            queue_seconds = _take_turn(flight, group, background.if_busy, how)
            if queue_seconds is None:
                flight.skip(_skipped(flight.path))
                return PendingSave(flight)
            job = ending.enter_context(job_of(source, directory, what, how, apart="background"))
            planning = time.perf_counter()
            # the path only now, so that all ranks learn of a wrong argument
            path, own = attempted(source, what, job, lambda: path or _checked_path(directory, how, background, job.size))
            job = beside_other_ranks(job, path, what.step)
            with job.for_all():
                how = around.before(how) if job.leads else how
            planned = plan(source, what, own, job)
            plan_seconds = time.perf_counter() - planning
            with warnings_collected() as warned:
                flight.staging = staging = stage(
                    planned.contents,
                    source,
                    _optimizers_in(what.training),
                    background.staging,
                    check_unchanged=background.check_unchanged,
                    workers=background.background_workers,
                    step_timeout=background.step_timeout,
                    ranks=job.size if job.parts is not None else 1,
                )
            flight.staged = staging.staged
            watch = _Watching(flight, staging, background.background_workers)
            save = partial(
                _save,
                flight,
                partial(
                    Planned,
                    needed=planned.needed,
                    cast=planned.cast,
                    left_out=planned.left_out,
                    frozen=planned.frozen,
                    options=planned.options,
                ),
                path,
                how._replace(progress=how.progress or False),  # a bar that nobody asked for would disturb those of the training
                Started(started, queue_seconds, plan_seconds, tuple(warned)),
                watch,
                job,
                ending.pop_all(),
            )
            del planned, own  # they have the tensors of the model
            if staging.mode == "blocking":
                flight.run_here(partial(around.write, save))
            else:
                staging.arm()
                flight.launch(partial(around.write, save), started)
            return PendingSave(flight)
    except BaseException:
        flight.abandon()
        raise


def _take_turn(flight: Flight[SaveReport], group: ProcessGroup | None, if_busy: IfBusy, how: How) -> float | None:
    """As `take_turn`; where the ranks of a ``group`` save, all do what is right on rank 0: their flights end at different moments."""
    if group is None or if_busy not in ("skip", "raise"):
        return take_turn(flight, if_busy)
    if not leader_is_busy(group, flight.path, if_busy, in_flight() is not None, how.rank_timeout, how.phase_timeout):
        return take_turn(flight, "wait")
    if if_busy == "skip":
        return None
    raise DirectoryBusyError(
        f"cannot save to {flight.path}: no other save in the background was expected, one is still running on the first rank; nothing was "
        f"written, the previous checkpoint is intact"
    )


def _checked_path(directory: str | os.PathLike[str], how: How, background: InBackground, processes: int = 1) -> str:
    path = check_how(directory, how)
    check_background(background)
    if background.staging == "ring" and processes > 1:
        raise ValueError(
            f"staging='ring' needs a save by one process, {processes} save together; use 'snapshot'; nothing was written"
        )
    return path


def check_background(background: InBackground) -> None:
    """Raises TypeError or ValueError for wrong arguments."""
    for name, value, allowed in (
        ("staging", background.staging, ("auto", "snapshot", "ring")),
        ("if_busy", background.if_busy, ("wait", "raise", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    check_switches(check_unchanged=background.check_unchanged)
    workers = background.background_workers
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"background_workers must be an int, not {type(workers).__name__}")
    if workers < 1:
        raise ValueError(f"background_workers must be at least 1, not {workers}")
    check_timeout(background.step_timeout, "step_timeout")


def _optimizers_in(training: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in ``training``, without accelerate's wrappers around them."""
    if training is None:
        return []
    import_at_use("shardsave._training.kinds")
    from shardsave._training.kinds import inner, kind_of, leaves_in

    return [inner(value) for _, value in leaves_in(training) if kind_of(value) == "optimizer"]


class _Watching:
    """The watch over a save in the background: whether it was cancelled, and what its staging says."""

    def __init__(self, flight: Flight[SaveReport], staging: StagedContents, workers: int) -> None:
        self.workers: int | None = workers
        self.staging = staging
        self._flight = flight

    @property
    def beside_training(self) -> bool:
        return self.staging.mode == "ring"

    def check(self) -> None:
        self._flight.check()
        self.staging.check()

    def attempt_commit(self) -> None:
        self._flight.check()
        self.staging.check_complete()
        self._flight.attempt_commit()

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        return self.staging.is_urgent(pieces)

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        return self.staging.begin_reading(pieces)

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        self.staging.end_reading(pieces, sums)


def _save(
    flight: Flight[SaveReport],
    plan_of: Callable[[Contents], Planned],
    path: str,
    how: How,
    started: Started,
    watch: _Watching,
    job: Job,
    ending: ExitStack,
) -> SaveReport:
    """Saves, on the saving thread. What the caller of a blocking save would be warned of is in the notes.

    ``plan_of``: makes the plan from the staged contents. ``ending``: ends the ``job``.
    """
    staging = watch.staging
    staging.use_streams()
    try:
        with warnings_collected() as warned, ending:  # what is raised within is told to other ranks
            flight.check()
            planned = settled(plan_of(staging.contents), how, job)
            report, warnings = write_planned(planned, flight.path, path, how, started.plan_seconds, watch, job)
    finally:
        staging.finish()  # before anything that others have to do: no step waits any more, and the memory is free
    flight.committed = True
    durable_seconds = time.perf_counter() - started.at
    report = replace(
        report,
        notes=tuple(dict.fromkeys((*report.notes, *staging.notes, *started.notes, *warned))),
        staging=staging.mode,
        staging_reason=staging.reason,
        stall_seconds=flight.stall_seconds or durable_seconds,
        queue_seconds=started.queue_seconds,
        step_wait_seconds=staging.step_wait_seconds,
        drain_seconds=staging.drain_seconds,
        durable_seconds=durable_seconds,
    )
    if job.leads:
        log_saved(report, warnings)
    return report


def _skipped(path: str) -> SaveReport:
    return SaveReport(
        path=path,
        bytes=0,
        tensors=0,
        shards=0,
        seconds=0.0,
        phases=Phases(),
        engine=engine_name(),
        direct=False,
        staging_bytes=0,
        pinned=False,
        durable=False,
        skipped=True,
    )
