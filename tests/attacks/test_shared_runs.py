"""Method: a run to whose directories everybody may write, in which another user has planted indexes and removals. A manager removes
nothing because of these.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from neighbours import (
    NEIGHBOUR,
    SAVER,
    TWO_USERS,
    WORK,
    by,
    give,
    plant_index,
    put,
)
from tampering import INDEX

import shardsave

pytestmark = TWO_USERS


def run_of(shared: Path) -> Path:
    """A run of the saver with two steps, to whose directories everybody may write."""
    manager = shardsave.CheckpointManager(shared / "run", save_every=1, durable=False, progress=False)
    for step in (1, 2):
        manager.save(step, {"new": torch.full((3,), float(step))})
        for path in (shared / "run" / f"step-{step:08d}").iterdir():
            give(path, SAVER)
        give(path.parent, SAVER).chmod(0o1777)
    for path in ((shared / "run"), *(shared / "run").glob("*.json")):
        give(path, SAVER)
    (shared / "run").chmod(0o1777)
    return shared / "run"


def commit(run: Path, step: int) -> str:
    """Saves a step and keeps no other; returns what is left of the run."""
    with shardsave.CheckpointManager(run, save_every=1, keep_last=1, durable=False, progress=False) as manager:
        manager.save(step, {"new": torch.full((3,), float(step))})
    return " ".join(sorted(str(path.relative_to(run)) for path in run.glob("step-*/*")))


def test_a_step_whose_index_another_user_made(shared: Path) -> None:
    """Catches a manager that removes the files that another user's index names."""
    run = run_of(shared)
    give(run / "step-00000001" / INDEX, NEIGHBOUR)
    left = by(SAVER, lambda: commit(run, 3))
    assert left.count("step-00000001/model") == 2 and "step-00000002" not in left and left.count("step-00000003") == 2, left


@pytest.mark.parametrize("in_place", [True, False])
def test_a_planted_removal(shared: Path, in_place: bool) -> None:
    """Catches a manager and a `clean` that finish a removal which another user made up."""
    run = run_of(shared)
    step = run / "step-00000001"
    for name in WORK:
        put(step / name, "work", SAVER)
    plant_index(step).rename(step / f"{INDEX}.removed")
    if in_place:
        shutil.copy(run / "step-00000002" / INDEX, step / INDEX)
        give(step / INDEX, SAVER)
    left = by(SAVER, lambda: commit(run, 3))
    assert all((step / name).read_text() == "work" for name in WORK), left
    cleaned = by(SAVER, lambda: shardsave.clean(run))
    assert "another user made it, or may have changed it; nothing was removed" in cleaned, cleaned
    assert all((step / name).read_text() == "work" for name in WORK)


def test_a_removal_that_had_just_begun(shared: Path) -> None:
    """Catches a step that nobody can remove any more: its index has two names, and one of two names is not obeyed."""
    run = run_of(shared)
    index = run / "step-00000001" / INDEX
    os.link(index, index.with_name(f"{INDEX}.removed"))
    left = by(SAVER, lambda: commit(run, 3))
    assert "step-00000001" not in left and "step-00000003" in left, left
