"""The example of the README, and the demonstration, started as a user starts them: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import shardsave
from support import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "fsdp2.py"


def torchrun(ranks: int, program: Path, folder: Path) -> str:
    """What ``ranks`` ranks that run ``program`` in ``folder`` print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first,second", [(4, 2), (2, 4)])
def test_the_example(tmp_path: Path, first: int, second: int) -> None:
    """Catches an example that fails on 2 or 4 ranks, that does not load what the other number has saved, or that loses flags."""
    assert "loaded" not in torchrun(first, EXAMPLE, tmp_path)
    frozen = load_file(tmp_path / "sharded" / "model-00001-of-00002.safetensors")
    assert {name: list(tensor.shape) for name, tensor in frozen.items()} == {"0.weight": [64, 32], "0.bias": [64]}
    output = torchrun(second, EXAMPLE, tmp_path)
    assert output.count("loaded") == 1 and output.count("saved") == 1, output
    found = shardsave.inspect(tmp_path / "sharded")
    assert found.frozen == {"0.bias", "0.weight"} and found.metadata == {"ranks": second}
    assert shardsave.load(tmp_path / "sharded")["0.weight"].equal(
        frozen["0.weight"]
    )  # what the first run saved, not new random values
    shardsave.verify(tmp_path / "sharded")


def test_the_example_in_the_readme() -> None:
    """Catches a README that shows another program than the one that is tested, and one that is too long to be read."""
    program = EXAMPLE.read_text()
    assert f"```py\n{program}```" in (ROOT / "README.md").read_text()
    assert len(program.splitlines()) <= 32


def test_the_demonstration(tmp_path: Path) -> None:
    """Catches a real sharded model that other ranks, or transformers in one process, do not open as it was saved."""
    command = [sys.executable, str(ROOT / "examples" / "demo_ranks.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 ranks: outputs equal: True" in done.stdout and "from_pretrained: outputs equal: True" in done.stdout, done.stdout
