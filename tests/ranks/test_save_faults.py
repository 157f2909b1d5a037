"""OS calls of one of four ranks that fail while all save, resume or keep a run together. Method: ``faults/ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.running import RANKS, least_calls, run_ranks_beneath

pytestmark = pytest.mark.slow

#: Every call fails in a save with a training state, which makes all calls of one without; some fail in the others.
SAVES = (
    "fails/training/overwrite/2",
    "fails_after/training/overwrite/9",
    "loses_its_disk/training/overwrite/12",
    "fails/plain/first/24",
    "fails/background/overwrite/24",
    "fails/hosts/first/24",
)


@pytest.mark.parametrize("rank", RANKS)
def test_each_call_of_a_rank_fails(beneath: Path, memory: Path, rank: int) -> None:
    """Catches a call of one rank whose failure another rank does not raise, that leaks on any of them, that tears a checkpoint, leaves
    litter, or leaves a model and a training state of two saves."""
    assert run_ranks_beneath(beneath, rank, memory, *SAVES) >= least_calls(rank)


@pytest.mark.parametrize("rank", RANKS)
def test_each_call_of_a_rank_that_resumes_or_keeps_a_run(beneath: Path, memory: Path, rank: int) -> None:
    """Catches a failure in a resume that other ranks do not raise, values of which some are not filled, and a next resume that fails;
    half of a step that counts as committed, a step that is removed although it must stay, and files that no manager finds."""
    runs = ("resume_fails/training/overwrite/3", "run_fails/plain/overwrite/9")
    assert run_ranks_beneath(beneath, rank, memory, *runs) >= least_calls(rank)
