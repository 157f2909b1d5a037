"""Faults during a manager's removal of steps. Method: as in ``storage/test_faults.py`` and ``storage/test_power_loss.py``."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shardsave
from faults.beneath import Recorded, read_record
from faults.power import Disk, Tree, lay_out
from faults.running import run_beneath
from faults.runs import manager_of, steps_in
from shardsave._runs.recorded import RECORD_NAME

pytestmark = pytest.mark.slow

SAMPLES = int(os.environ.get("SHARDSAVE_POWER_SAMPLES", "12")) // 4

Phases = list[list[Recorded]]


@pytest.mark.parametrize("kind", ["plain", "config", "training", "reuse"])
def test_each_call_of_a_removal(beneath: Path, memory: Path, kind: str) -> None:
    """Catches a moment at which a killed or failed removal leaves half of a step that counts as committed, loses one that the policy
    keeps, or leaves files that the next manager does not find; and a failure that is not logged."""
    printed = run_beneath(beneath, "native", ["-m", "faults.runs", "fates", str(memory)], kind=kind)
    assert min(map(int, re.findall(r"(\d+) trials", printed))) >= 20, printed


@pytest.fixture(scope="module", params=["plain", "reuse"])
def recordings(beneath: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Of runs whose steps share nothing, and of runs in which each step takes a shard over from the one before."""
    folder = tmp_path_factory.mktemp("recordings")
    run_beneath(beneath, "native", ["-m", "faults.runs", "recordings", str(folder)], kind=request.param)
    return folder


def phases_of(recording: Path) -> Phases:
    return [read_record(path) for path in sorted(recording.glob("phase-?"))]


class Judge:
    """Lays out each disk that a loss of power may leave, and says what is wrong with the run there."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._known: dict[bytes, str] = {}

    def violations(self, root: Path, phases: Phases, oldest: list[int], doubtful: int = 0) -> Iterator[str]:
        """Cuts the power before each call. ``oldest``: in each phase, the oldest step that may be the latest one left; 0 for none.
        ``doubtful``: a step whose save does not wait for the disk."""
        self._doubtful = doubtful
        disk, chance = Disk(root), random.Random(1)
        for phase, least in zip(phases, oldest):
            for call in phase:
                for problem in self._look(disk, chance, least):
                    yield f"before {call.call} of {call.path.name}: {problem}"
                disk.apply(call)

    def _look(self, disk: Disk, chance: random.Random, least: int) -> Iterator[str]:
        for tree in disk.after_power_loss(chance, SAMPLES) if least else ():
            digest = hashlib.sha256(repr((least, sorted((str(p), c) for p, c in tree.items()))).encode()).digest()
            if digest not in self._known:
                self._known[digest] = self._problem(tree, least)
            if self._known[digest]:
                yield self._known[digest]

    def _problem(self, tree: Tree, least: int) -> str:
        lay_out(tree, self._scratch / "disk")
        run = self._scratch / "disk" / "run"
        try:
            committed = steps_in(run, self._doubtful)
            if not committed or committed[-1] < least:
                return f"steps {committed} are left"
            if self._doubtful and self._doubtful not in committed:
                return ""  # a corrupt step stays
            manager_of(run).commit(9)
            left = {*os.listdir(run)} - {"step-00000009", RECORD_NAME, f"{RECORD_NAME}.new"}
            return f"{left} stay" if left else ""
        except (shardsave.ShardSaveError, AssertionError) as error:
            return str(error)[:200]
        finally:
            shutil.rmtree(self._scratch / "disk")


@pytest.fixture
def judge(memory: Path) -> Judge:
    return Judge(memory)


def test_power_loss_during_a_removal(recordings: Path, judge: Judge) -> None:
    """Catches a step that is removed before the step that takes its place is durable, and one that comes back in part."""
    root = recordings / "plain" / "watched"
    found = [*judge.violations(root, phases_of(recordings / "plain"), [0, 1, 2], doubtful=3)]
    assert not found, found


def test_power_loss_after_a_killed_saver(recordings: Path, judge: Judge) -> None:
    """Catches a removal that relies on a step whose saver died before its commit was durable."""
    root = recordings / "killed" / "watched"
    found = [*judge.violations(root, phases_of(recordings / "killed"), [0, 1, 1])]
    assert not found, found


def without(phases: Phases, wrong: Callable[[Recorded], bool]) -> Phases:
    return [[call for call in phase if not wrong(call)] for phase in phases]


def test_the_model_finds_omissions(recordings: Path, judge: Judge) -> None:
    """Catches a judge that finds nothing: without one of the fsyncs, a loss of power must show."""
    root, phases = recordings / "plain" / "watched", phases_of(recordings / "plain")
    folders = {f"step-{step:08d}" for step in (1, 2, 3)}
    sync_of_folders = without(phases, lambda call: call.call == "fsync" and call.path.name in folders)
    assert next(judge.violations(root, sync_of_folders, [0, 0, 2], doubtful=3), None)
    sync_of_shards = without(phases, lambda call: call.call == "fsync" and "step-00000003" in str(call.path))
    assert next(judge.violations(root, sync_of_shards, [0, 0, 2], doubtful=3), None)
