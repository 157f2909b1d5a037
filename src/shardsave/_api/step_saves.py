"""How a manager saves a step, in the call or in the background, and what follows a commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shardsave._api.run_ranks import RunRanks
from shardsave._api.run_verbs import PublicVerbs
from shardsave._common.imports import import_at_use
from shardsave._common.job_errors import retold
from shardsave._common.shutdown import raise_if_ending
from shardsave._runs.keeper import Keeper
from shardsave._runs.policies import SaveWhen
from shardsave._runs.steps import Run
from shardsave.errors import (
    DurabilityUncertainError,
    OutOfSpaceError,
    SaveCancelledError,
    SaveNotCommittedError,
    ShardSaveError,
)

if TYPE_CHECKING:
    from shardsave._api.pending_save import PendingSave
    from shardsave._api.reports import SaveReport
    from shardsave._api.save import How

#: How often a thread that waits looks whether the process ends, in seconds.
_POLL_SECONDS = 0.1


class StepSaves:
    """Saves the steps of ``run``. ``keeper`` removes those that no policy keeps, ``when`` is told of each attempt.

    Where several ``ranks`` save together, rank 0 alone looks at the other steps, calls ``on_commit`` and removes steps.

    Threads: one trains and calls everything. What follows a commit in the background runs on the saving thread; nothing here and nothing
    of ``keeper`` is touched by the other one meanwhile, since only the next save or `settle` does that, and both wait for it.
    """

    def __init__(
        self, run: Run, keeper: Keeper, when: SaveWhen, on_commit: Callable[[SaveReport], object] | None, ranks: RunRanks
    ) -> None:
        self._run = run
        self._ranks = ranks
        self._keeper = keeper
        self._when = when
        self._on_commit = on_commit
        self._verbs = PublicVerbs()
        self._pending: tuple[int, PendingSave] | None = None

    def now(self, step: int, model: Any, metrics: Mapping[str, float], options: Mapping[str, Any]) -> SaveReport:
        """Saves a step and returns when it is saved."""

        def save() -> SaveReport:
            before, path = partial(self._prepare, step), self._run.path_of(step)
            try:
                return self._verbs.save(model, path, before, step=step, metrics=metrics, options=options)
            finally:
                self._when.done(step)

        return self._write(step, metrics, save)

    def later(self, step: int, model: Any, metrics: Mapping[str, float], options: Mapping[str, Any]) -> PendingSave:
        """Saves a step in the background."""
        import_at_use("shardsave._api.background")
        from shardsave._api.background import Around

        around = Around(partial(self._prepare, step), partial(self._write, step, metrics))
        path = self._run.path_of(step)
        try:
            pending = self._verbs.save_async(model, path, around, step=step, metrics=metrics, options=options)
        finally:
            self._when.done(step)
        if not pending.skipped:
            self._pending = step, pending
        return pending

    def meeting(self, options: Mapping[str, Any], *, asynchronous: bool) -> str:
        """The kind of the session with which a save with these options begins."""
        if not asynchronous:
            return ""
        return "turn" if options.get("if_busy") in ("skip", "raise") else "background"

    def settle(self, timeout: float | None = None, *, of: int | None = None) -> bool:
        """Waits for the last save in the background, whatever comes of it; only if it is that of step ``of``, if that is given.

        Returns False if it takes longer than ``timeout`` seconds.
        """
        if self._pending is None or of not in (None, self._pending[0]) or self._pending[1].is_of_this_thread:
            return True  # also in `on_commit`, which runs on the saving thread
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._pending[1].wait_ended(_POLL_SECONDS if deadline is None else _left(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            raise_if_ending()
        return True

    def release_memory(self) -> None:
        """Frees the memory that is kept for the next snapshot."""
        import_at_use("shardsave._background.snapshot")
        from shardsave._background.snapshot import release_snapshot_memory

        release_snapshot_memory()

    def raise_untold(self) -> None:
        """Raises the error of the last save in the background, if nobody has asked for it."""
        pending = self._pending[1] if self._pending is not None else None
        if pending is not None and pending.is_untold and not isinstance(pending.exception(), SaveCancelledError):
            pending.wait()

    def _prepare(self, step: int, how: How) -> How:
        """Called before anything is written. Returns how to save."""
        self._keeper.remover.wait()  # the space of what goes is needed
        self._check(self._keeper.check_new, step)
        how = how._replace(locked=partial(self._check, self._keeper.check_still_new, step))
        if how.reuse is not None:
            return how
        return how._replace(reuse=self._run.to_take_from(step, self._keeper.uncounted))  # the last durable step

    def _check(self, check: Callable[[int, str], None], step: int) -> None:
        """Calls a check of the keeper. A run that cannot be read is no error of its own: the save is not made."""
        try:
            check(step, self._ranks.advice)
        except ShardSaveError as error:
            if type(error) is not ShardSaveError:
                raise
            raise SaveNotCommittedError(f"cannot save to {self._run.path_of(step)}: {error}; nothing was written") from error

    def _write(self, step: int, metrics: Mapping[str, float], save: Callable[[], SaveReport]) -> SaveReport:
        """Calls ``save``, then does what follows a commit."""
        if not self._ranks.leads:
            return save()
        try:
            report = save()
        except OutOfSpaceError as error:
            told = retold(error, OutOfSpaceError(f"{error}; {self._keeper.left_by_full_disk(step)}"))
            raise told from told.__cause__
        except DurabilityUncertainError as error:
            self._keeper.uncounted[step] = str(error)
            raise
        finally:
            _remove_empty(self._run.path_of(step))
        self._keeper.uncounted.pop(step, None)
        self._keeper.note_own(step)
        self._keeper.remover.note_saved(step, durable=report.durable)
        report = replace(report, notes=(*report.notes, *self._keeper.notes_on_metrics(step, metrics)))
        try:
            if self._on_commit is not None:
                self._on_commit(report)
        finally:
            self._keeper.tidy()
        return report


def _left(deadline: float) -> float:
    return min(_POLL_SECONDS, max(0.0, deadline - time.monotonic()))


def _remove_empty(folder: str) -> None:
    """Removes the directory of a save that wrote nothing; one with anything in it stays."""
    with suppress(OSError):
        os.rmdir(folder)
