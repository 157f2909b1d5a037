"""One of four ranks is killed or stopped while all save, resume or keep a run together. Method: ``faults/ranks.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.running import RANKS, least_calls, run_ranks_beneath

pytestmark = pytest.mark.slow

#: A rank ends at every call of a save; at some of the others. With a training state, rank 0 makes twice as many.
SAVES = {
    rank: (
        f"is_killed/plain/overwrite/{1 if rank == 0 else 6}",
        f"is_killed/training/overwrite/{9 if rank == 0 else 1}",
        f"is_killed_after/training/first/{24 if rank == 0 else 9}",
        f"is_killed/background/overwrite/{24 if rank == 0 else 9}",
        f"is_killed/hosts/first/{24 if rank == 0 else 9}",
    )
    for rank in RANKS
}


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_killed_at_each_call(beneath: Path, memory: Path, rank: int) -> None:
    """Catches a rank whose death others do not raise, or raise in other words, or that leaves something open on them; a checkpoint that is
    neither the old nor the new one, or not what the error says; and a next save that does not work."""
    assert run_ranks_beneath(beneath, rank, memory, *SAVES[rank]) >= least_calls(rank)


def test_a_rank_killed_at_any_moment(beneath: Path, tmp_path: Path) -> None:
    """Catches the same at any moment, whatever the threads of a rank do, on a disk. ``SHARDSAVE_RANK_KILLS``: how many of each kind."""
    runs = [f"is_killed_at_random/{kind}/overwrite/1" for kind in ("plain", "training", "background")]
    assert run_ranks_beneath(beneath, 0, tmp_path, *runs) >= 20


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_stopped_or_killed_in_a_resume_or_a_run(beneath: Path, memory: Path, rank: int) -> None:
    """Catches ranks that wait for one that is stopped, and one that commits or removes something when the others have given it up; a death
    in a resume that changes the checkpoint; half of a step that counts as committed, and a step that is removed although it must stay."""
    runs = (
        f"is_stopped/training/overwrite/{45 if rank == 0 else 9}",
        "resume_is_killed/training/overwrite/15",
        f"run_is_killed/plain/overwrite/{18 if rank == 0 else 9}",
    )
    assert run_ranks_beneath(beneath, rank, memory, *runs) >= least_calls(rank)
