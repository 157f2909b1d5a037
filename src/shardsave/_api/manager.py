"""`CheckpointManager`: a run of steps. Decides when to save and which steps stay, resumes from the last step that can be read."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from shardsave._api.arguments import check_path, check_switches, check_timeout
from shardsave._api.run_options import RunOptions
from shardsave._api.run_ranks import RunRanks
from shardsave._api.run_turns import Turns
from shardsave._api.step_resumes import StepResumes
from shardsave._api.step_saves import StepSaves
from shardsave._common.job_errors import short_traceback
from shardsave._common.log_records import log_event
from shardsave._common.os_calls import absolute_path
from shardsave._common.shutdown import verb
from shardsave._common.words import some
from shardsave._runs.arguments import checked_best, checked_count, checked_metrics, checked_step
from shardsave._runs.keeper import Keeper
from shardsave._runs.policies import KeepChosen, UserPolicy, save_when
from shardsave._runs.recorded import RecordedPolicy
from shardsave._runs.removal import pin, unpin
from shardsave._runs.signals import SaveRequests
from shardsave._runs.steps import Run, StepInfo

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.pending_save import PendingSave
    from shardsave._api.reports import SaveReport
    from shardsave._api.resumed import Resumed

__all__ = ["CheckpointManager", "StepInfo"]

#: What a save returns: `SaveReport`, or `PendingSave` if the manager is asynchronous.
Saved = TypeVar("Saved")


class CheckpointManager(Generic[Saved]):
    """Saves a training run as a directory of steps (``run/step-00001000``), each an ordinary checkpoint, and resumes from the last one.

    Nothing but the steps themselves says which one is the latest: it is the last one that was committed. Steps that no policy keeps are
    removed in the background, after the new one is durable. Without ``keep_last``, ``keep_every``, ``keep_best`` and ``policy``, all
    steps stay; with any of them, a step stays if one of them keeps it, if it is the latest, or if it is pinned.

    Args:
        directory: the run. It is created by the first save.
        save_every: save at each multiple of this number of steps, or when that much time has passed since the last save (``"30s"``,
            ``"10min"``, ``"2h"``). None: only `save` and signals save.
        keep_last: keep this number of steps, the last ones.
        keep_every: keep, for each multiple of this number of steps, the first step that is not before it.
        keep_best: ``(metric, "min" or "max", count)``: keep the steps with the best values of a metric.
        policy: a function that receives all committed steps (a tuple of `StepInfo`) and returns those to keep.
        on_commit: called with the `SaveReport` of each save, on the thread that saved, before steps are removed.
        on_corrupt: what `resume` does about a corrupt step: "previous" takes the one before it, "raise" raises.
        asynchronous: save with `save_async`: `step` and `save` return a `PendingSave`, and training goes on. What follows a commit
            (``on_commit``, removing steps) is done on the saving thread.
        options: keywords of `save` (of `save_async`, if asynchronous), for each save of this manager; ``rng``, ``process_group``,
            ``rank_timeout``, ``phase_timeout`` and ``progress`` are for `resume` too.
            Without ``reuse``, shards that have not changed since the last durable step are not written again: both steps have them, and
            they are on the disk once. With ``reuse=False`` every step is written whole.

    Raises:
        TypeError, ValueError: for wrong arguments.

    For one thread. In a forked child, it has nothing to remove.

    Collective:
        With ``process_group``, or if the model has DTensors, every rank makes a manager for the same directory, and makes the same calls
        of `resume`, `step`, `save` and `save_on_signal`, the last one before the first `step` or `save`. Rank 0 chooses the step to
        resume from, keeps and removes steps, and alone calls ``on_commit``. Time and signals are decided by rank 0 at the end of each
        `step` for the next one. `latest`, `steps` and `pin` are of each rank alone.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> with shardsave.CheckpointManager("run", save_every=10, keep_last=2) as manager:
        ...     resumed = manager.resume(model)
        ...     for step in range(resumed.next_step if resumed else 1, 41):
        ...         report = manager.step(step, model, metrics={"loss": 1 / step})
        >>> [info.step for info in manager.steps()]
        [30, 40]
    """

    @overload
    def __init__(
        self: CheckpointManager[SaveReport],
        directory: str | os.PathLike[str],
        *,
        save_every: int | str | None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, str, int] | None = None,
        policy: UserPolicy | None = None,
        on_commit: Callable[[SaveReport], object] | None = None,
        on_corrupt: Literal["previous", "raise"] = "previous",
        asynchronous: Literal[False] = False,
        **options: Any,
    ) -> None: ...

    @overload
    def __init__(
        self: CheckpointManager[PendingSave],
        directory: str | os.PathLike[str],
        *,
        save_every: int | str | None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, str, int] | None = None,
        policy: UserPolicy | None = None,
        on_commit: Callable[[SaveReport], object] | None = None,
        on_corrupt: Literal["previous", "raise"] = "previous",
        asynchronous: Literal[True],
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_every: int | str | None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, str, int] | None = None,
        policy: UserPolicy | None = None,
        on_commit: Callable[[SaveReport], object] | None = None,
        on_corrupt: Literal["previous", "raise"] = "previous",
        asynchronous: bool = False,
        **options: Any,
    ) -> None:
        check_path(directory)
        save_every = int(save_every) if isinstance(save_every, Integral) and not isinstance(save_every, bool) else save_every
        self._when = save_when(save_every)
        keep_last, keep_every = checked_count("keep_last", keep_last), checked_count("keep_every", keep_every)
        best = checked_best(keep_best)
        for name, function in (("policy", policy), ("on_commit", on_commit)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, not {type(function).__name__}")
        if on_corrupt not in ("previous", "raise"):
            raise ValueError(f"on_corrupt must be 'previous' or 'raise', not {on_corrupt!r}")
        check_switches(asynchronous=asynchronous)
        self._asynchronous = asynchronous
        self._options = RunOptions(options, asynchronous=asynchronous)
        own = getattr(policy, "__qualname__", type(policy).__qualname__) if policy is not None else None
        recorded = RecordedPolicy(save_every, keep_last, keep_every, best, own)
        keeps = [*recorded.keeps(), *([KeepChosen(policy)] if policy is not None else [])]
        self._shown = os.fspath(directory)
        self._run = Run(absolute_path(self._shown))
        self._keeper = Keeper(self._run, self._shown, keeps, recorded)
        self._ranks = RunRanks(self._shown)
        self._saves = StepSaves(self._run, self._keeper, self._when, on_commit, self._ranks)
        self._resumes = StepResumes(self._run, self._shown, self._keeper, self._when, on_corrupt, self._ranks)
        self._requests = SaveRequests()
        self._turns = Turns(self._when, self._requests, self._ranks)
        self._told_unsaved = False

    @property
    def preempted(self) -> bool:
        """Whether a signal of `save_on_signal` came and the last save after it is committed: the training should end now.

        On several ranks, it becomes true on all after the same step, whichever rank the signal came to.
        """
        return self._turns.preempted

    def __enter__(self) -> CheckpointManager[Saved]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        if error is None:
            self._saves.raise_untold()

    def close(self) -> None:
        """Puts the signal handlers back, waits for a save in the background, and until all steps that are to be removed are gone.

        Raises the error of the last save in the background if nobody has learnt of it by `PendingSave.wait` or `PendingSave.exception`;
        the end of a ``with`` block does so too, unless it ends with an error. May be called any number of times.
        """
        self._close()
        self._saves.raise_untold()

    def _close(self) -> None:
        self._requests.restore()
        if self._turns.unsaved and not self._told_unsaved:
            self._told_unsaved = True
            words = (
                f"{some(self._turns.unsaved)} asked for a last save of {self._shown}, and no step was saved after it: call save at the end "
                f"of the training"
            )
            log_event(logging.WARNING, "signal without a save", words, path=self._run.path)
        self._turns.close()
        self._saves.settle()
        self._keeper.remover.wait()
        if self._asynchronous:
            self._saves.release_memory()

    def wait_removed(self, timeout: float | None = None) -> bool:
        """Waits until the steps that no policy keeps are gone, and before that for a save in the background.

        Returns False if that takes longer than ``timeout`` seconds.
        """
        if timeout is not None:
            check_timeout(timeout, "timeout")
        started = time.monotonic()
        if not self._saves.settle(timeout):
            return False
        return self._keeper.remover.wait(None if timeout is None else max(0.0, timeout - (time.monotonic() - started)))

    @short_traceback
    def step(
        self, step: int, model: Any, *, training: Any = None, metrics: Mapping[str, Any] | None = None, **options: Any
    ) -> Saved | None:
        """Tells the manager that ``step`` is finished. Saves if it is time, or if a signal asks for it.

        Step 0 is never saved. A save that fails raises, and leaves all steps as they are: training can go on, and the next save is at
        the next multiple of ``save_every``. A save in the background raises only for wrong arguments and what cannot be saved; one
        that a signal asks for is waited for, after the one in flight, and raises its error here.

        Args:
            step: the number of the step that was just finished.
            model, training: as in `save`.
            metrics: name → number; read only if the step is saved. `keep_best` and ``shardsave list`` use them.
            options: more keywords of `save`; they override those of the manager.

        Returns:
            The report of the save, or the `PendingSave` if the manager is asynchronous; None if nothing was saved.

        Raises:
            TypeError, ValueError: for wrong arguments.
            OutOfSpaceError: as in `save`; the message says what the policy will remove after the next commit, and its size.
            SaveNotCommittedError: also if another process seems to write this run: it has a later step, or this one is there already.
            ShardSaveError: ranks cannot tell each other when to save, since the store of their job is lost; what was committed stays.
            all that `save` raises.
        """
        self._begin_turn(model, training, options)
        try:
            step = checked_step(step)
            wrong = self._options.error_in(options)
            if wrong is not None and not self._ranks.are_many:
                raise wrong
            due = self._turns.due(step)
            if step == 0 or not (due or self._turns.names):
                if wrong is not None:
                    raise wrong
                return None
            return self._save_in_turn(step, model, training, metrics, options)
        finally:
            self._turns.end()

    @short_traceback
    def save(
        self, step: int, model: Any, *, training: Any = None, metrics: Mapping[str, Any] | None = None, **options: Any
    ) -> Saved:
        """Saves ``step`` now. Everything else is as in `step`, also after a signal."""
        self._begin_turn(model, training, options)
        self._turns.order()
        try:
            return self._save_in_turn(step, model, training, metrics, options)
        finally:
            self._turns.end()

    def _begin_turn(self, model: Any, training: Any, options: Mapping[str, Any]) -> None:
        self._ranks.look(model, self._options.of_save(options), training)
        self._turns.begin()

    def _save_in_turn(
        self, step: int, model: Any, training: Any, metrics: Mapping[str, Any] | None, options: dict[str, Any]
    ) -> Saved:
        names = self._turns.names
        if not names:
            return self._save(step, model, training, metrics, options)
        saved = self._last_save(step, model, training, metrics, options)
        self._turns.preempted = True
        if self._ranks.leads:
            words, path = f"saved step {step} of {self._shown} because of {some(names)}", self._run.path_of(step)
            log_event(logging.INFO, "preempted", words, path=path, step=step)
        return saved

    def _last_save(
        self, step: int, model: Any, training: Any, metrics: Mapping[str, Any] | None, options: dict[str, Any]
    ) -> Saved:
        """Saves a step and waits for it; also if the manager is asynchronous."""
        if not self._asynchronous:
            return self._save(step, model, training, metrics, options)
        pending = self._save(step, model, training, metrics, {**options, "if_busy": "wait"})
        cast("PendingSave", pending).wait()
        return pending

    @verb()
    def _save(self, step: int, model: Any, training: Any, metrics: Mapping[str, Any] | None, options: dict[str, Any]) -> Saved:
        given = self._options.of_save(options, training)
        try:
            step = checked_step(step)
            if step == 0:
                raise ValueError("step 0 is never saved: a step is saved once it is finished, and the first one is step 1")
            self._options.check(options)
            numbers = checked_metrics(metrics)
        except (TypeError, ValueError) as error:
            where = self._run.path_of(step) if isinstance(step, int) else f"{self._shown}, step {step!r}"
            self._ranks.refuse(error, "save to", where, self._saves.meeting(given, asynchronous=self._asynchronous))
        save = self._saves.later if self._asynchronous else self._saves.now
        return cast(Saved, save(step, model, numbers, given))

    @short_traceback
    @verb()
    def resume(self, model: nn.Module, *, training: Any = None, **options: Any) -> Resumed | None:
        """Fills ``model`` (and ``training``) from the latest step; returns None if there is none.

        A corrupt step is passed over, and named in a note and a log record; the one before it is taken. If the damage was found only
        while the model was being filled, that needs a step that fills everything again: with ``strict=False``, ``only`` or ``skip``, the
        error is raised instead. What the operating system refuses to read is never taken for a corrupt step.

        Args:
            model: the model to fill.
            training, options: as in `shardsave.resume`; options override those of the manager.

        Raises:
            TypeError: for a wrong keyword, also if there is no step.
            IncompatibleCheckpointError: also if the directory of the run is a checkpoint itself.
            CorruptCheckpointError: no step can be read, or ``on_corrupt="raise"``.
            ShardSaveError: a step that may be the latest cannot be read.
            all that `shardsave.resume` raises.
        """
        wrong = self._options.error_in_resume(options)
        self._saves.settle()
        self._ranks.look(model, self._options.of_save(options), training)
        if wrong is not None:
            self._ranks.refuse(wrong, "resume from", self._shown, "run")
        return self._resumes.resume(model, self._options.of_resume(options, training))

    @verb()
    def latest(self) -> StepInfo | None:
        """The last committed step, None if there is none. Reads indexes alone, so it does not find all damage that `resume` finds.

        A corrupt step is passed over as in `resume`. Raises ShardSaveError for a step that cannot be read.
        """
        return self._resumes.latest()

    @verb()
    def steps(self) -> tuple[StepInfo, ...]:
        """All steps of the run in order, in whatever state. Raises ShardSaveError if the run cannot be listed."""
        return self._run.steps()

    @verb()
    def pin(self, step: int) -> None:
        """Keeps ``step`` from being removed, by this process or any other, until `unpin`.

        The mark is a file in the step's directory. It is no count: two processes that pin a step share one mark.

        Raises:
            CheckpointNotFoundError: there is no such step. DirectoryBusyError, ShardSaveError: it could not be marked.
        """
        step = checked_step(step)
        self._saves.settle(of=step)
        pin(self._run.path, step)

    @verb()
    def unpin(self, step: int) -> None:
        """Undoes `pin`. If no policy keeps the step, it is removed after the next commit."""
        step = checked_step(step)
        self._saves.settle(of=step)
        unpin(self._run.path, step)

    def save_on_signal(self, *signals: int) -> None:
        """Lets the first of each of these signals (SIGTERM, if none is given) ask for a last save, instead of what it does now.

        A save that is at work goes on to its end. The next `step` saves, whatever ``save_every`` says, and then `preempted` is true.
        The first signal also puts the previous handler back, so a second one does what it did before: SIGTERM ends the process at
        once. `close` puts all handlers back. A forked child obeys the previous handlers. On several ranks, all must call it; a signal on
        any of them lets all save at the same one of the next steps.

        Raises:
            ValueError: this is not the main thread, or a handler could not be put back.
        """
        for number in signals or (signal.SIGTERM,):
            self._requests.listen(signal.Signals(number))
