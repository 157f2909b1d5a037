"""The example of the README, and the demonstration, as a user starts them: by torchrun, or in ranks that take part as its ranks do."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import shardsave
from jobs import run_ranks
from support import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
EXAMPLE = EXAMPLES / "fsdp2.py"


def torchrun(ranks: int, program: Path, folder: Path) -> str:
    """What ``ranks`` ranks that run ``program`` in ``folder`` print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_program(rank: int, program: Path, folder: Path, *arguments: str) -> str:
    """Runs a program that makes the group itself, with what torchrun puts into its environment; returns what it prints."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    dist.barrier()  # no rank leaves before all have connected
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", OMP_NUM_THREADS="1")
    os.chdir(folder)
    sys.path.insert(0, str(program.parent))
    sys.argv[:] = [str(program), *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(program), run_name="__main__")
    return printed.getvalue()


def forked(ranks: int, program: Path, folder: Path) -> str:
    """The same as `torchrun`, in a moment."""
    return "".join(run_ranks(ranks, run_program, program, folder))


@pytest.mark.parametrize("first,second,start", [(4, 2, forked), (2, 4, forked), (4, 2, torchrun)])
def test_the_example(tmp_path: Path, first: int, second: int, start: Any) -> None:
    """Catches an example that fails on 2 or 4 ranks, that does not load what the other number has saved, or that loses flags."""
    assert "loaded" not in forked(first, EXAMPLE, tmp_path)
    frozen = load_file(tmp_path / "sharded" / "model-00001-of-00002.safetensors")
    assert {name: list(tensor.shape) for name, tensor in frozen.items()} == {"0.weight": [64, 32], "0.bias": [64]}
    output = start(second, EXAMPLE, tmp_path)
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


@pytest.mark.filterwarnings("ignore")  # those of transformers
def test_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a real sharded model that other ranks, or transformers in one process, do not open as it was saved."""
    program, printed = EXAMPLES / "demo_ranks.py", []

    def in_place_of_torchrun(command: list[str], check: bool, env: dict[str, str]) -> None:
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"] and command[6] == str(
            program
        )
        printed.extend(run_ranks(int(command[5]), run_program, program, tmp_path, *command[7:], libraries=True))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(subprocess, "run", in_place_of_torchrun)
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    output = "".join(printed) + capsys.readouterr().out
    assert "2 ranks: outputs equal: True" in output and "from_pretrained: outputs equal: True" in output, output
