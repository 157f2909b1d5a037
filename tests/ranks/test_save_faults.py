"""OS calls of one of four ranks that fail while all save, resume or keep a run together. Method: ``faults/ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.running import RANKS, least_calls, run_ranks_beneath

pytestmark = pytest.mark.slow

#: Every call of a save fails; some do in the others. With a training state, rank 0 makes twice as many.
SAVES = {
    rank: (
        f"fails/plain/overwrite/{2 if rank == 0 else 12}",
        f"fails/training/overwrite/{12 if rank == 0 else 2}",
        f"fails_after/training/overwrite/{12 if rank == 0 else 6}",
        f"loses_its_disk/training/overwrite/{18 if rank == 0 else 6}",
        f"fails/background/overwrite/{36 if rank == 0 else 12}",
        f"fails/hosts/first/{36 if rank == 0 else 12}",
    )
    for rank in RANKS
}


@pytest.mark.parametrize("rank", RANKS)
def test_each_call_of_a_rank_fails(beneath: Path, memory: Path, rank: int) -> None:
    """Catches a call of one rank whose failure another rank does not raise, that leaks on any of them, that tears a checkpoint, leaves
    litter, or leaves a model and a training state of two saves."""
    assert run_ranks_beneath(beneath, rank, memory, *SAVES[rank]) >= least_calls(rank)


def test_calls_of_a_save_that_takes_over_a_shard(beneath: Path, memory: Path) -> None:
    """Catches a call of the rank that takes over a shard whose failure or death leaves a shard missing, damages either checkpoint, or is
    not told to the others."""
    runs = ("fails/reuse/overwrite/40", "is_killed/reuse-step/overwrite/40", "is_killed/reuse/overwrite/90")
    assert run_ranks_beneath(beneath, 0, memory, *runs) >= least_calls(0)


@pytest.mark.parametrize("rank", RANKS)
def test_each_call_of_a_rank_that_resumes_or_keeps_a_run(beneath: Path, memory: Path, rank: int) -> None:
    """Catches a failure in a resume that other ranks do not raise, values of which some are not filled, and a next resume that fails;
    half of a step that counts as committed, a step that is removed although it must stay, and files that no manager finds."""
    runs = ("resume_fails/training/overwrite/3", "run_fails/plain/overwrite/12")
    assert run_ranks_beneath(beneath, rank, memory, *runs) >= least_calls(rank)
