"""Saves in the background that fail or are cancelled, hundreds of times; see `background.failing`."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest

from faults.running import run_beneath

#: How many saves: `make soak` makes more.
TRIALS = os.environ.get("SHARDSAVE_BACKGROUND_FAILURES", "200")


@pytest.mark.slow
def test_failures_and_cancellations(beneath: Path, memory: Path) -> None:
    """Catches a save in the background that hangs, raises into the training, is logged twice, leaks, or spoils the previous checkpoint."""
    seed = random.randrange(1 << 30)
    printed = run_beneath(beneath, "native", ["-m", "background.failing", TRIALS, str(seed), str(memory)])
    outcomes = ast.literal_eval(printed)
    assert sum(outcomes.values()) == int(TRIALS) and outcomes.keys() >= {
        "committed",
        "SaveCancelledError",
        "SaveNotCommittedError",
        "OutOfSpaceError",
        "DirectoryBusyError",
    }, (seed, outcomes)
