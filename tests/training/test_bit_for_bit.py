"""A resumed training is, bit for bit, the training that never stopped.

Method: one process trains each configuration for 20 steps, and again for 10, and saves it; a new process resumes all of them, in several
ways, and makes the other 10 steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

pytestmark = pytest.mark.slow

BY_GROUP = (
    "AdamW", "AdamW foreach", "AdamW fused amsgrad", "AdamW bf16", "float32 state of bfloat16", "SGD", "SGD without state", "Adafactor",
    "Adafactor bf16", "torch Adafactor", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "ASGD",
)  # fmt: skip
WAYS = ("", "groups swapped", "frozen left out", "both")


def run(action: str, folder: Path) -> dict[str, Any]:
    program = ROOT / "tests" / "training" / "configurations.py"
    paths = [str(ROOT / "tests"), str(ROOT / "tests" / "training"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(program), action, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    digests: dict[str, Any] = json.loads(done.stdout)
    return digests


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trainings")
    return run("train", folder), run("resume", folder)


def check(digests: tuple[dict[str, Any], dict[str, Any]], name: str, way: str = "") -> list[str]:
    """Asserts that the result is the same. Returns the notes."""
    straight, resumed = digests
    digest, notes = resumed[f"{name}, {way}"]
    assert digest == straight[name], notes
    return list(notes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BY_GROUP)
def test_one_optimizer(digests: tuple[dict[str, Any], dict[str, Any]], name: str, way: str) -> None:
    """Catches state that is lost, cast, given to another parameter or another group, and schedulers whose groups changed places."""
    notes = check(digests, name, way)
    if name == "Adagrad" and way in ("frozen left out", "both"):  # it has state for all parameters from the beginning
        assert len(notes) == 1 and "unused" in notes[0] and "'3.weight', '3.bias'" in notes[0]
    else:
        assert notes == []


@pytest.mark.parametrize("name", ["LBFGS", "several", "everything", "accelerate"])
def test_other_trainings(digests: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    """Catches what one of them loses: state that is one vector; several optimizers; generators, averages, scaler and the order of data."""
    assert check(digests, name) == []


def test_data_loader(digests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Catches a data loader of torchdata that goes on with other samples."""
    pytest.importorskip("torchdata")
    assert check(digests, "torchdata") == []


LOW_BITS = ("AdamW8bit", "AdamW8bit bf16", "AdamW4bit", "AdamWFp8")


@pytest.mark.parametrize("name", LOW_BITS)
def test_low_bit_optimizers(digests: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    """Catches codes, scales or tables of torchao's state that are lost or cast."""
    pytest.importorskip("torchao")
    assert check(digests, name) == []


def test_every_configuration_is_checked(digests: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Catches a configuration that no test looks at, and results that are the same whatever the training does."""
    assert {*digests[0]} - {"torchdata", *LOW_BITS} == {*BY_GROUP, "LBFGS", "several", "everything", "accelerate"}
    assert len({*digests[0].values()}) == len(digests[0]) - (digests[0]["everything"] == digests[0].get("torchdata"))
