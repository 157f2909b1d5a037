"""Faults on one of four ranks that save together: beneath libc, and by signals. Method: ``faults/ranks.py``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faults.running import run_beneath, trials

pytestmark = pytest.mark.slow

#: The rank, what was there before, how many calls lie between two that are tried, and the least number of calls.
RANKS = [(0, "overwrite", 5, 100), (2, "first", 1, 10)]

#: What was there before, a kind of `savers`, and how many calls lie between two that are tried: a shard that is taken over from another
#: checkpoint, or in the place of its own.
REUSE = [("first", "reuse-step", 41), pytest.param("overwrite", "reuse", 7, marks=pytest.mark.large)]


def run(beneath: Path, scenario: str, before: str, rank: int, folder: Path, every: int = 1, kind: str = "plain") -> int:
    """The number of calls that the rank made. ``SHARDSAVE_EVERY`` of the environment wins over ``every``."""
    arguments = ["-m", "faults.ranks", scenario, before, str(rank), str(folder)]
    setting = f"SHARDSAVE_EVERY={os.environ.get('SHARDSAVE_EVERY', every)}"
    return trials(run_beneath(beneath, "native", arguments, "env", setting, kind=kind))


@pytest.mark.parametrize(("before", "kind", "every"), REUSE)
def test_each_call_of_a_save_that_takes_over_a_shard(beneath: Path, memory: Path, before: str, kind: str, every: int) -> None:
    """Catches a call of the rank that takes over a shard whose failure or death leaves a shard missing, damages either checkpoint, or is
    not told to the others."""
    assert run(beneath, "fails,is_killed", before, 0, memory, every, kind) >= 100


@pytest.mark.parametrize(("rank", "before", "every", "least"), RANKS)
def test_each_call_of_a_rank_fails(beneath: Path, memory: Path, rank: int, before: str, every: int, least: int) -> None:
    """Catches a call of one rank whose failure another rank does not raise, that leaks on any of them, that tears a checkpoint or leaves
    litter."""
    assert run(beneath, "fails", before, rank, memory, every) >= least


@pytest.mark.parametrize(("rank", "before", "every", "least"), RANKS)
def test_a_rank_killed_at_each_call(beneath: Path, memory: Path, rank: int, before: str, every: int, least: int) -> None:
    """Catches a rank whose death others do not raise, or that some raise in other words; a checkpoint that is neither the old nor the new
    one, or not what the error says; and a next save that does not work."""
    assert run(beneath, "is_killed", before, rank, memory, 2 * every) >= least


def test_a_rank_killed_or_stopped_at_random(beneath: Path, tmp_path: Path) -> None:
    """Catches the same at any moment, whatever the threads of a rank do, on a disk; and ranks that wait for one that is stopped."""
    assert run(beneath, "is_killed_at_random", "overwrite", 0, tmp_path) >= 20
