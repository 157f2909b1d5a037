"""How a manager finds the step to resume from: the last one that can be read."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardsave._api.run_ranks import RunRanks
from shardsave._api.run_verbs import PublicVerbs
from shardsave._common.job_errors import retold
from shardsave._common.log_records import log_event
from shardsave._common.words import count
from shardsave._runs.keeper import Keeper
from shardsave._runs.no_run import refuse_checkpoint
from shardsave._runs.policies import SaveWhen
from shardsave._runs.reading import reading
from shardsave._runs.steps import Run, StepInfo
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError

if TYPE_CHECKING:
    from torch import nn

    from shardsave._api.resumed import Resumed


class StepResumes:
    """Resumes from the steps of ``run``. ``shown``: its path, in messages. ``keeper`` is told which steps are corrupt, ``when`` which
    step was resumed from. ``on_corrupt``: as in `CheckpointManager`. Where several ``ranks`` resume together, rank 0 chooses the step.
    """

    def __init__(self, run: Run, shown: str, keeper: Keeper, when: SaveWhen, on_corrupt: str, ranks: RunRanks) -> None:
        self._run = run
        self._ranks = ranks
        self._shown = shown
        self._keeper = keeper
        self._when = when
        self._on_corrupt = on_corrupt
        self._verbs = PublicVerbs()

    def resume(self, model: nn.Module, options: Mapping[str, Any]) -> Resumed | None:
        """As `CheckpointManager.resume`; ``options``: all keywords of `shardsave.resume`."""
        passed: list[str] = []
        with closing(self._choices(passed)) as choices:
            while True:
                step, notes = self._ranks.from_leader("the step to resume from", lambda: next(choices))
                if step is None:
                    return None
                path = self._run.path_of(step)
                try:
                    resumed = self._verbs.resume(path, model, step=step, options=options)
                except CheckpointNotFoundError:
                    continue  # another process has just removed it
                except CorruptCheckpointError as error:
                    if _fills_a_part(options):
                        words = (
                            f"cannot resume from {path}: {error}; the step before it is not taken, since with strict=False, only= or skip= "
                            f"it might not fill all that this one has filled"
                        )
                        told = retold(error, CorruptCheckpointError(words))
                        raise told from told.__cause__
                    self._pass_over(step, path, str(error))
                    passed.append(_passed(path, str(error)))
                else:
                    return self._resumed(step, resumed, notes)

    def _choices(self, passed: list[str]) -> Generator[tuple[int | None, list[str]]]:
        """The steps that seem to be whole, from the last one back, each with notes on those that were passed over; then None, or an error
        if all were. The lock on a step is held until the next one is asked for. ``passed`` has the notes; the caller adds to it.
        """
        refuse_checkpoint(self._run, "resume from", self._shown)
        for info in self._run.newest_first():
            problem = _refusal(info)
            if problem:
                self._pass_over(info.step, info.path, problem)
                passed.append(_passed(info.path, problem))
            elif problem is not None:
                with suppress(CheckpointNotFoundError), reading(info.path):  # another process may have just removed it
                    yield info.step, passed
        if passed:
            raise CorruptCheckpointError(
                f"cannot resume from {self._shown}: a step that can be read was expected, {count(len(passed), 'step')} "
                f"{'is' if len(passed) == 1 else 'are'} corrupt ({passed[0]}); the model may be filled in part"
            )
        words = f"nothing to resume in {self._shown}: it has no committed step"
        log_event(logging.INFO, "nothing to resume", words, path=self._run.path)
        yield None, passed

    def latest(self) -> StepInfo | None:
        """As `CheckpointManager.latest`."""
        for info in self._run.newest_first():
            problem = _refusal(info)
            if problem == "":
                with_new_bytes = (one for one in self._run.steps() if one.step == info.step and one.committed)
                return next(with_new_bytes, info)
            if problem is not None:
                self._pass_over(info.step, info.path, problem)
        return None

    def _pass_over(self, step: int, path: str, problem: str) -> None:
        if self._on_corrupt == "raise":
            raise CorruptCheckpointError(
                f"cannot resume from {path}: {problem}; earlier steps are as they were, on_corrupt='previous' resumes from the last that "
                f"can be read"
            )
        self._keeper.uncounted[step] = problem
        if self._ranks.leads:
            words = f"{path} is corrupt, and is passed over: {problem}"
            log_event(logging.WARNING, "step corrupt", words, path=path, step=step, problem=problem)

    def _resumed(self, step: int, resumed: Resumed, notes: list[str]) -> Resumed:
        self._when.done(step)
        self._keeper.note_own(step)
        return replace(resumed, notes=(*notes, *resumed.notes))


def _passed(path: str, problem: str) -> str:
    return f"{path} is corrupt and was passed over: {problem}"


def _fills_a_part(options: Mapping[str, Any]) -> bool:
    return options.get("strict", True) is not True or bool(options.get("only")) or bool(options.get("skip"))


def _refusal(info: StepInfo) -> str | None:
    """Why a step cannot be resumed from: "" if it can, None if it is none. Raises IncompatibleCheckpointError for a newer format."""
    if info.state == "newer":
        raise IncompatibleCheckpointError(info.problem)
    if info.state == "corrupt":
        return info.problem or "it is corrupt"
    return "" if info.committed else None
