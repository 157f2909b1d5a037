"""Faults on one of four ranks that save together: beneath libc, and by signals. Method: ``faults/ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.running import run_beneath, trials

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("rank", "before", "scenario", "least"), [(0, "overwrite", "fails_once", 100), (2, "first", "fails", 10)]
)
def test_each_call_of_a_rank_fails(beneath: Path, memory: Path, rank: int, before: str, scenario: str, least: int) -> None:
    """Catches a call of one rank whose failure another rank does not raise, that leaks on any of them, that tears a checkpoint or leaves
    litter."""
    arguments = ["-m", "faults.ranks", scenario, before, str(rank), str(memory)]
    assert trials(run_beneath(beneath, "native", arguments)) >= least


@pytest.mark.parametrize(("rank", "before", "every", "least"), [(0, "overwrite", "6", 100), (2, "first", "2", 10)])
def test_killed_at_each_call(
    beneath: Path, memory: Path, rank: int, before: str, every: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank whose death others do not raise, or that some raise in other words; a checkpoint that is neither the old nor the new
    one, or not what the error says; and a next save that does not work."""
    monkeypatch.setenv("SHARDSAVE_EVERY", every)
    arguments = ["-m", "faults.ranks", "is_killed", before, str(rank), str(memory)]
    assert trials(run_beneath(beneath, "native", arguments)) >= least


def test_killed_or_stopped_at_random(beneath: Path, tmp_path: Path) -> None:
    """Catches the same at any moment, whatever the threads of a rank do, on a disk; and ranks that wait for one that is stopped."""
    arguments = ["-m", "faults.ranks", "is_killed_at_random", "overwrite", "0", str(tmp_path)]
    assert trials(run_beneath(beneath, "native", arguments)) >= 20
