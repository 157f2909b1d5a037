"""Runs fault scenarios in a process of their own, with the library beneath libc preloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support import ROOT

ENGINES = ("native", "portable")

#: In ``make soak``: every rank, and every call of it.
ALL_OF_RANKS = os.environ.get("SHARDSAVE_RANK_FAULTS") == "all"
RANKS = (0, 1, 2, 3) if ALL_OF_RANKS else (0, 2)


def run_beneath(beneath: Path, engine: str, arguments: list[str], *before: str, kind: str = "plain") -> str:
    """Runs ``python arguments`` with the library preloaded; returns what it printed. ``kind``: what is saved, see `savers.KIND`."""
    paths = os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])
    preload = ["env", f"LD_PRELOAD={beneath}"]
    wanted = {"PYTHONPATH": paths, "SHARDSAVE_ENGINE": engine, "SHARDSAVE_FAULTS_KIND": kind}
    done = subprocess.run(
        [*before, *preload, sys.executable, "-W", "error", *arguments],
        env={**os.environ, **wanted},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_ranks_beneath(beneath: Path, rank: int, folder: Path, *runs: str) -> int:
    """The number of calls that ``rank`` made in the scenario that had the fewest. ``runs``: as for ``faults.ranks``."""
    if ALL_OF_RANKS:
        runs = tuple(dict.fromkeys(longer for run in runs for longer in _of_soak(*run.split("/"))))
    return trials(run_beneath(beneath, "native", ["-m", "faults.ranks", str(rank), str(folder), *runs]))


def _of_soak(scenario: str, kind: str, before: str, every: str) -> list[str]:
    """What the soak does instead: all calls, of first saves and of others."""
    befores = ["first", "overwrite"] if scenario.startswith(("fails", "loses", "is_")) else [before]
    return [f"{scenario}/{kind}/{before}/1" for before in befores]


def least_calls(rank: int) -> int:
    """The least number of calls that a rank makes in a save."""
    return 10 if rank else 80


def trials(printed: str) -> int:
    """The number of trials of the scenario that had the fewest."""
    return min(int(number) for number in re.findall(r"(\d+) trials", printed))
