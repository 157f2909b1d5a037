"""Loads, conversions and `clean` under the same faults as saves. Method: see ``tests/faults``."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.running import ENGINES, fates, run_beneath, trials

pytestmark = pytest.mark.slow

SINGLE_FILE = ("-m", "storage.remembering", "single_file")


@pytest.mark.parametrize("engine", ENGINES)
def test_each_call_of_a_load(beneath: Path, tmp_path: Path, engine: str) -> None:
    """Catches a load that returns wrong values, raises an unclear error, or keeps a descriptor, because a call failed, returned fewer
    bytes than were asked for, or was interrupted."""
    scenarios = "load_fails,load_is_interrupted"
    assert trials(run_beneath(beneath, engine, ["-m", "faults.scenarios", scenarios, "overwrite", str(tmp_path)])) > 60


@pytest.mark.parametrize("before", ["first", "overwrite"])
def test_each_call_of_a_conversion(beneath: Path, memory: Path, before: str) -> None:
    """Catches a torn file, a scratch file that stays for good, and a descriptor that stays open."""
    killed = fates("file_is_killed", "file_killed_at_each_call")
    arguments = [*SINGLE_FILE, f"file_is_interrupted,{killed}", before, str(memory)]
    assert trials(run_beneath(beneath, "native", arguments)) >= 40


@pytest.mark.parametrize(("scenario", "before"), [("file_fails", "first"), ("file_slice_fails", "overwrite")])
def test_each_failing_call_of_a_conversion(beneath: Path, memory: Path, scenario: str, before: str) -> None:
    """Catches a failure that is swallowed or reported as another, and a file that is changed although the error says it is not."""
    assert trials(run_beneath(beneath, "native", [*SINGLE_FILE, scenario, before, str(memory)])) >= 40


def test_each_call_of_a_clean(beneath: Path, memory: Path) -> None:
    """Catches a `clean` that damages the checkpoint when it fails or ends halfway, and one that the next `clean` cannot finish."""
    scenario = fates("clean_meets", "clean_meets_some")
    assert trials(run_beneath(beneath, "native", [*SINGLE_FILE, scenario, "overwrite", str(memory)])) >= 10


def test_each_call_of_a_clean_with_a_training_state(beneath: Path, memory: Path) -> None:
    """Catches the same for the directory of a training state that a killed saver had moved to its final name."""
    arguments = [*SINGLE_FILE, "clean_meets_training", "overwrite", str(memory)]
    assert trials(run_beneath(beneath, "native", arguments, kind="training")) >= 20
