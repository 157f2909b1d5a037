"""Runs fault scenarios in processes of their own, with the library beneath libc preloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from support import ROOT
from warm_python import Server, warm_python

ENGINES = ("native", "portable")

#: In ``make soak``. The commit is the same whatever the engine: every fate meets it once, the slices go where the calls before it differ.
EVERY_FATE = os.environ.get("SHARDSAVE_SAVE_FATES") == "all"

#: In ``make soak``: every rank, and every call of it.
ALL_OF_RANKS = os.environ.get("SHARDSAVE_RANK_FAULTS") == "all"
RANKS = (0, 1, 2, 3) if ALL_OF_RANKS else (0, 2)


def fates(every: str, some: str, whole: bool = False) -> str:
    """The scenarios: ``every`` with ``whole``, or with SHARDSAVE_SAVE_FATES=all; ``some`` otherwise."""
    return every if whole or EVERY_FATE else some


#: What is imported before a scenario begins, besides torch, by what it saves.
MODULES = dict.fromkeys(["config", "adapter"], ("transformers.modeling_utils", "peft"))


def run_beneath(beneath: Path, engine: str, arguments: list[str], *before: str, kind: str = "plain") -> str:
    """Runs ``python arguments`` with the library preloaded; returns what it printed. ``kind``: what is saved, see `savers.KIND`.

    ``before``: a command that starts Python; then torch is imported anew.
    """
    wanted = {"SHARDSAVE_ENGINE": engine, "SHARDSAVE_FAULTS_KIND": kind}
    if before:
        command = [*before, "env", f"LD_PRELOAD={beneath}", sys.executable, "-W", "error", *arguments]
        environment = {**os.environ, **_paths(), **wanted}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    else:
        done = warm_python(*MODULES.get(kind, ()), preload=str(beneath)).run(arguments, action="error", **wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])}


@cache
def _ranks_servers(beneath: Path) -> list[Server]:
    return []


def _ranks_server(beneath: Path) -> Server:
    """A process that makes jobs, whose server of ranks stays from one test to the next."""
    known = _ranks_servers(beneath)
    if not known or not known[-1].lives:
        environment = {**os.environ, **_paths(), "SHARDSAVE_ENGINE": "native", "LD_PRELOAD": str(beneath)}
        known.append(Server([sys.executable, "-W", "error", "-m", "faults.ranks"], environment))
    return known[-1]


def run_ranks_beneath(beneath: Path, rank: int, folder: Path, *runs: str) -> int:
    """The number of calls that ``rank`` made in the scenario that had the fewest. ``runs``: as for ``faults.ranks``."""
    if ALL_OF_RANKS:
        runs = tuple(dict.fromkeys(longer for run in runs for longer in _of_soak(*run.split("/"))))
    server = _ranks_server(beneath)
    printed = [server.ask([str(rank), str(folder), *runs])]
    while not printed[-1].startswith("end "):
        printed.append(server.line())
    assert printed[-1] == "end 0\n", "".join(printed)
    return trials("".join(printed))


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
