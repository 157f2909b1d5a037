"""Runs fault scenarios in a process of their own, with the library beneath libc preloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support import ROOT

ENGINES = ("native", "portable")


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


def trials(printed: str) -> int:
    """The number of trials of the scenario that had the fewest."""
    return min(int(number) for number in re.findall(r"(\d+) trials", printed))
