"""Method: the N-th OS call of a manager's removal of steps meets a fate, for N = 1, 2, … until there are no more calls. Each time, every
step that is committed is whole, the step that the policy keeps is committed, and the next manager leaves nothing of the others.

``python -m faults.runs fates|recordings FOLDER``, with the library of ``beneath.c`` preloaded.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import secrets
import shutil
import sys
from itertools import count
from pathlib import Path

import shardsave
from faults import savers
from faults.beneath import Fate, Met, arm, disarm
from faults.recordings import Recording, number_of
from faults.savers import copy_tree, generation_in
from faults.scenarios import held, nothing_leaked, remember_sums
from shardsave._runs.recorded import RECORD_NAME
from shardsave._runs.steps import Run

#: Of each kind of what is saved; with ``SHARDSAVE_RUN_FATES=all``, every fate.
FATES = {
    "plain": [(Fate.KILL_AFTER, 0), (Fate.FAIL, errno.EIO), (Fate.FAIL, errno.ENOSPC), (Fate.FAIL_FROM_HERE, errno.EIO)],
    "config": [(Fate.KILL_AFTER, 0)],
    "training": [(Fate.KILL_AFTER, 0), (Fate.FAIL_FROM_HERE, errno.EIO)],
    "reuse": [(Fate.KILL_AFTER, 0), (Fate.FAIL, errno.EIO), (Fate.FAIL_FROM_HERE, errno.EIO)],
}
ALL_FATES = [
    (Fate.KILL, 0),
    (Fate.KILL_AFTER, 0),
    *((Fate.FAIL, number) for number in (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE)),
    (Fate.FAIL_AFTER, errno.EIO),
    (Fate.FAIL_FROM_HERE, errno.EIO),
]


def _save(step: int, folder: Path, durable: bool = True) -> None:
    """Two shards; with ``savers.KIND`` "config", one and a config; with "training", two and a training state; with "reuse", one of the two
    is taken over from the last durable step, as a manager does."""
    if savers.KIND not in ("plain", "reuse"):
        savers.save(step, folder, durable)
        return
    earlier = Run(str(folder.parent)).to_take_from(step, ())
    report = shardsave.save(savers.state(step), folder, max_shard_size=5000, durable=durable, progress=False, reuse=earlier)
    assert len(report.reused) == (savers.KIND == "reuse" and earlier is not None), report


class Manager(shardsave.CheckpointManager):
    """Saves a step whose values are its number, as the tests of other faults do."""

    def commit(self, step: int, durable: bool = True) -> None:
        _save(step, Path(self._run.path_of(step)), durable)
        self.remove()

    def remove(self) -> None:
        self._keeper.tidy()
        assert self.wait_removed(60)


def manager_of(run: Path) -> Manager:
    return Manager(run, save_every=None, keep_last=1)


def steps_in(run: Path, doubtful: int = 0) -> list[int]:
    """The committed steps; all of them are whole, and none is corrupt, but for the step ``doubtful``: that one may be anything."""
    infos = [info for info in Run(str(run)).steps() if info.step != doubtful or _is_whole(info)]
    assert all(info.state in ("committed", "unfinished", "removing") for info in infos), infos
    committed = [info for info in infos if info.committed]
    assert all(map(_is_whole, committed)), committed
    return [info.step for info in committed]


def _is_whole(info: shardsave.StepInfo) -> bool:
    try:
        return info.committed and generation_in(Path(info.path)) == info.step
    except shardsave.CorruptCheckpointError:
        return False


class Warnings(logging.Handler):
    """Counts the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("shardsave").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def removal_meets(folder: Path, fate: Fate, number: int, warnings: Warnings) -> int:
    """Each call of a removal of step 1, with step 2 to keep, meets ``fate``."""
    run, template = folder / "watched" / "run", folder / "template"
    for nth in count(1):
        shutil.rmtree(folder / "watched", ignore_errors=True)
        copy_tree(template, run)
        warnings.messages.clear()
        before = held()
        child = os.fork() if fate in (Fate.KILL, Fate.KILL_AFTER) else -1
        if child > 0:
            met = Met("killed", run) if os.waitpid(child, 0)[1] else None
        else:
            arm(folder / "watched", nth, fate, number)
            manager_of(run).remove()
            if child == 0:
                os._exit(0)
            met = disarm()
            assert nothing_leaked(before), (met, "leaked")
            assert steps_in(run) == [2] or warnings.messages, (met, "is not logged")
        assert steps_in(run)[-1] == 2
        manager_of(run).commit(3)
        assert steps_in(run) == [3] and set(os.listdir(run)) == {"step-00000003", RECORD_NAME}, (met, os.listdir(run))
        if met is None:
            return nth
    raise AssertionError


def fates(folder: Path) -> None:
    remember_sums()
    for step in (1, 2):
        _save(step, folder / "template" / f"step-{step:08d}")
    assert steps_in(folder / "template") == [1, 2]
    manager_of(folder / "warm").commit(1)
    gc.freeze()
    warnings = Warnings()
    for fate, number in ALL_FATES if os.environ.get("SHARDSAVE_RUN_FATES") == "all" else FATES[savers.KIND]:
        print(
            f"{fate.name} {errno.errorcode.get(number, '')}: {removal_meets(folder, fate, number, warnings)} trials", flush=True
        )


def _named(step: int, manager: Manager, durable: bool = True) -> None:
    """Commits a step with random names that follow from its number."""
    numbers = count()
    secrets.token_hex = lambda size: f"{step:x}{next(numbers):0{2 * size - 1}x}"
    manager.commit(step, durable)


def recordings(folder: Path) -> None:
    """Two recordings: steps that one manager commits, the last one without waiting for the disk; and a removal by the manager after one
    that was killed right after its commit."""
    plain = Recording(folder / "plain")
    plain.target = plain.watched / "run"
    manager = manager_of(plain.target)
    for step in (1, 2):
        plain.phase(lambda: _named(step, manager))
    plain.phase(lambda: _named(3, manager, durable=False))
    trial = Recording(folder / "trial")
    for step in (1, 2):
        record = trial.phase(lambda: _save(step, trial.watched / "run" / f"step-{step:08d}"))
    number = number_of(record, "renameat", savers.INDEX)
    killed = Recording(folder / "killed")
    run = killed.watched / "run"
    killed.phase(lambda: _save(1, run / "step-00000001"))
    killed.phase_in_child(lambda: _save(2, run / "step-00000002"), number, Fate.KILL_AFTER)
    killed.phase(lambda: manager_of(run).remove())


if __name__ == "__main__":
    {"fates": fates, "recordings": recordings}[sys.argv[1]](Path(sys.argv[2]))
