"""Keeps the steps of a run that its policies want, and has the others removed once a new one is committed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from shardsave._common.log_records import log_event
from shardsave._common.os_calls import CallFailed, NotRegular, TooLong
from shardsave._common.words import count, human_bytes, some
from shardsave._format.file_names import INDEX_NAME
from shardsave._format.index import MAX_INDEX_BYTES
from shardsave._runs.no_run import refuse_checkpoint
from shardsave._runs.policies import Keep, KeepBest, kept
from shardsave._runs.recorded import RecordedPolicy, write_policy
from shardsave._runs.remover import Remover
from shardsave._runs.steps import Run, StepInfo
from shardsave._storage.directory import Directory
from shardsave.errors import SaveNotCommittedError, ShardSaveError


class Keeper:
    """The policies ``keeps`` for one run; ``recorded`` is what others are told of them. ``shown``: the run's path, in messages.

    ``uncounted``: steps that are not what their index says, and why: corrupt, or perhaps not durable. No policy counts or removes them.
    """

    def __init__(self, run: Run, shown: str, keeps: Sequence[Keep], recorded: RecordedPolicy) -> None:
        self.remover = Remover(run)
        self.uncounted: dict[int, str] = {}
        self._run = run
        self._shown = shown
        self._keeps = keeps
        self._recorded = recorded
        self._swept = False
        self._own: dict[int, bytes | None] = {}

    def note_own(self, step: int) -> None:
        """Notes that this process has saved or resumed ``step``, so that it may save it again."""
        self._own[step] = self._digest(step)

    def _digest(self, step: int) -> bytes | None:
        """A digest of the index of ``step``, which has the time of the save and checksums; None if it cannot be read."""
        try:
            with Directory() as folder:
                folder.open(self._run.path_of(step))
                data = folder.read_all(INDEX_NAME, MAX_INDEX_BYTES)
        except (CallFailed, NotRegular, TooLong):
            return None
        return hashlib.blake2b(data).digest() if data is not None else None

    def check_new(self, step: int, advice: str = "") -> None:
        """Raises SaveNotCommittedError if ``step`` may not be saved: its directory is a link, perhaps to another step, which would be
        overwritten; or the run has a later step, so `resume` would never find this one, and a policy might remove it; or the last step
        is of another process: this very step, or one that this process has saved and that is no longer what it saved. Raises
        IncompatibleCheckpointError if the run is a checkpoint itself. ``advice``: what else could be done about another writer.
        """
        refuse_checkpoint(self._run, f"save step {step} to", self._shown)
        path = self._run.path_of(step)
        if os.path.islink(path):
            raise SaveNotCommittedError(
                f"cannot save to {path}: a directory, or nothing, was expected, it is a symbolic link; nothing was written, what it leads "
                f"to is as it was"
            )
        for number in reversed(self._run.numbers()):
            if number < step and number not in self._own:
                return
            info = self._run.read(number)
            if info is None or not info.committed or number in self.uncounted:
                continue
            return self._refuse(step, self._problem_of(number, step), advice)

    def check_still_new(self, step: int, advice: str = "") -> None:
        """Called with the lock of its directory, for which another process may have let this one wait. Raises SaveNotCommittedError if
        ``step`` was committed since `check_new`.
        """
        info = self._run.read(step)
        if info is not None and info.committed and step not in self.uncounted:
            self._refuse(step, self._problem_of(step, step), advice)

    def _refuse(self, step: int, problem: str, advice: str) -> None:
        if problem:
            raise SaveNotCommittedError(
                f"cannot save step {step} to {self._shown}: {problem}; another process may be writing this run, which must have "
                f"one writer: end it, resume the run, or give this training another directory{advice}; nothing was written"
            )

    def _problem_of(self, last: int, step: int) -> str:
        """Why ``step`` may not be saved after the step ``last``, which is committed; "" if it may."""
        if last > step:
            return f"a step after all others was expected, step {last} is there already"
        if last not in self._own:
            return "a new step, or one that this process has saved or resumed, was expected, it is there already"
        before, now = self._own[last], self._digest(last)
        if before is None or now is None or before == now:
            return ""
        return f"step {last} was expected to be as this process has saved or resumed it, it was saved again since"

    def notes_on_metrics(self, step: int, metrics: Mapping[str, float]) -> tuple[str, ...]:
        """Names each policy of the best steps for which ``step`` does not count, since it lacks the metric; logs it too."""
        problems = [keep.problem(metrics) for keep in self._keeps if isinstance(keep, KeepBest)]
        notes = tuple(f"step {step} {problem}: keep_best does not count it" for problem in problems if problem)
        for note in notes:
            log_event(logging.WARNING, "metric missing", note, path=self._run.path_of(step), step=step, problem=note)
        return notes

    def tidy(self) -> None:
        """After a commit: starts the removal of the steps that no policy keeps, and finishes what died processes have left."""
        try:
            steps = self._run.steps()
            write_policy(self._run.path, self._recorded)
        except ShardSaveError as error:
            words = f"no step of {self._shown} is removed this time: {error}"
            return log_event(logging.WARNING, "removal failed", words, path=self._run.path, problem=str(error))
        except CallFailed as error:
            log_event(
                logging.WARNING,
                "policy not recorded",
                f"{self._shown}: {error.words}",
                path=self._run.path,
                problem=error.words,
            )
        for info in steps:
            if info.state == "unreadable":
                log_event(
                    logging.WARNING,
                    "step unreadable",
                    f"{info.path} stays: {info.problem}",
                    path=info.path,
                    problem=info.problem,
                )
        counted = self._counted(steps)
        stay = kept(counted, self._keeps)
        doomed = [info.step for info in counted if info.step not in stay]
        unfinished = {"removing"} if self._swept else {"removing", "unfinished"}
        self._swept = True
        busy = self.remover.busy
        left = [info.step for info in steps if (info.state in unfinished or info.half_removed) and info.step not in busy]
        if doomed:
            goes = some(map(str, doomed))
            words = f"{self._shown}: {count(len(stay), 'step')} kept, {count(len(doomed), 'step')} will be removed: {goes}"
            log_event(logging.INFO, "policy", words, path=self._run.path, kept=stay, removed=doomed)
        self.remover.start(doomed, left, sorted(stay))

    def left_by_full_disk(self, step: int) -> str:
        """Which steps there are after a save of ``step`` failed, and what the policies would remove if it were committed."""
        try:
            steps = self._run.steps()
        except ShardSaveError as error:
            return f"the steps of the run cannot be listed ({error})"
        last = max((info.step for info in steps if info.committed), default=None)
        words = f"all steps are as they were, the latest is step {last}" if last is not None else "the run has no step yet"
        return f"{words}; {self._would_free(step, [info for info in self._counted(steps) if info.step != step])}"

    def _would_free(self, step: int, counted: list[StepInfo]) -> str:
        try:
            stay = kept([*counted, StepInfo(step, self._run.path_of(step), "committed")], self._keeps)
        except Exception as error:  # of the user's own policy: what it hides is worse
            words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
            return f"what the policy would remove is not known, it raised {words}"
        doomed = [info.step for info in counted if info.step not in stay]
        if not doomed:
            return "the policy would remove no step: remove some by hand to make room"
        size = human_bytes(self._run.bytes_of_only(set(doomed)))
        return f"once a new step is committed, the policy removes {some(f'step {number}' for number in doomed)} and frees at most {size}"

    def _counted(self, steps: Iterable[StepInfo]) -> list[StepInfo]:
        """The committed steps on which a policy may rely, and which are not being removed."""
        busy = self.remover.busy
        return [info for info in steps if info.committed and info.step not in self.uncounted and info.step not in busy]
