"""Steps of a run that share frozen shards: what the manager takes over, what a removal frees, and what is listed.

Method: a frozen layer and a trainable one, each with a shard of its own, are saved as steps.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import shardsave
from shardsave._cli.main import cli
from shardsave._runs.steps import Run
from shardsave._storage.directory import Directory
from support import same_state

#: Bytes of tensors in one of the two layers.
LAYER = 4 * (50 * 50 + 50)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[0].requires_grad_(False)
    return model


def manager_of(folder: Path, **options: Any) -> shardsave.CheckpointManager:
    return shardsave.CheckpointManager(folder, save_every=None, progress=False, **options)


@torch.no_grad()
def train(manager: shardsave.CheckpointManager, model: nn.Sequential, *steps: int, **options: Any) -> list[int]:
    """Changes the trainable layer before each step, and saves it. Returns the bytes that were written."""
    written = []
    for step in steps:
        model[1].weight.add_(1)
        written.append(manager.save(step, model, **options).bytes_written)
    return written


def file_of(folder: Path, step: int, name: str = "0.weight") -> Path:
    """The file that has a tensor."""
    path = folder / f"step-{step:08d}"
    return path / shardsave.inspect(path).tensors[name].shard


def test_frozen_weights_are_written_once(tmp_path: Path) -> None:
    """Catches a manager that writes frozen weights again, and a step that is damaged when an earlier one with its shard is removed."""
    model = make_model()
    with manager_of(tmp_path, keep_last=2) as manager:
        assert train(manager, model, 1, 2, 3, 4) == [2 * LAYER, LAYER, LAYER, LAYER]
        assert manager.wait_removed(60)
        assert [info.step for info in manager.steps()] == [3, 4]
        assert os.path.samefile(file_of(tmp_path, 3), file_of(tmp_path, 4)) and file_of(tmp_path, 4).stat().st_nlink == 2
    other = make_model()
    shardsave.load_model(other, tmp_path / "step-00000004")
    assert same_state(model, other) and shardsave.verify(tmp_path / "step-00000003").verified


def test_a_step_that_is_saved_again(tmp_path: Path) -> None:
    """Catches a step that is saved again and takes its shards from an earlier one, though it has them itself."""
    model = make_model()
    with manager_of(tmp_path) as manager:
        train(manager, model, 1, 2)
        with torch.no_grad():
            model[0].weight.add_(1)
        assert train(manager, model, 2, 2) == [2 * LAYER, LAYER]


def test_the_last_durable_step(tmp_path: Path) -> None:
    """Catches a shard of a step that may not survive a loss of power, of one that is corrupt, and a run whose steps are never shared
    again once one of them was not durable; and options of the manager that it overrides."""
    model = make_model()
    with manager_of(tmp_path) as manager:
        train(manager, model, 1)
        assert train(manager, model, 2, durable=False) == [LAYER]
        assert train(manager, model, 3) == [LAYER]
        assert os.path.samefile(file_of(tmp_path, 3), file_of(tmp_path, 1))
        file_of(tmp_path, 3).unlink()
        assert train(manager, model, 4) == [LAYER] and os.path.samefile(file_of(tmp_path, 4), file_of(tmp_path, 1))
        assert train(manager, model, 5, reuse=False) == [2 * LAYER]
        assert train(manager, model, 6, reuse=tmp_path / "step-00000001") == [LAYER]
        assert os.path.samefile(file_of(tmp_path, 6), file_of(tmp_path, 1))
    with manager_of(tmp_path, reuse=False) as manager:
        assert train(manager, model, 7) == [2 * LAYER]


def test_shared_bytes_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bytes that are listed twice though they are on the disk once, and new bytes that are listed as shared."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    with manager_of(Path("run")) as manager:
        train(manager, model, 1, 2, 3)
        first, second, _ = manager.steps()
        assert first.new_bytes == first.bytes and 0 < second.new_bytes - LAYER < 6000
        assert second.shared_bytes == file_of(Path("run"), 1).stat().st_size
    printed = CliRunner().invoke(cli, ["list", "run"]).stdout.splitlines()
    assert re.search(r"29\.\d kB  29\.\d kB +0 B", printed[1]) and re.search(r"29\.\d kB  15\.\d kB  14\.3 kB", printed[2]), (
        printed
    )
    as_json = json.loads(CliRunner().invoke(cli, ["list", "run", "--json"]).stdout)
    assert [step["shared_bytes"] for step in as_json["steps"]] == [0, second.shared_bytes, second.shared_bytes]
    total = sum(step["new_bytes"] for step in as_json["steps"])
    files = {path.stat().st_ino: path.stat().st_size for path in Path("run").glob("step-*/*")}
    assert total == sum(files.values())


def test_clones_are_listed(tmp_path: Path) -> None:
    """Catches a clone, whose bytes no system call tells from others, that counts as new; and one that counts as shared although the step
    from which it came is gone."""
    model = make_model()
    with manager_of(tmp_path) as manager:
        train(manager, model, 1, 2, 3)
        for step in (2, 3):  # as a file system with clones would have it
            file = file_of(tmp_path, step)
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content)
        shared = len(file_of(tmp_path, 1).read_bytes())
        assert [info.shared_bytes for info in manager.steps()] == [0, shared, shared]
        run = Run(str(tmp_path))
        run.steps()
        sizes = {step: run.bytes_of_only({step}) for step in (1, 2, 3)}
        assert all(run.steps()[step - 1].bytes == sizes[step] + shared for step in sizes)
        assert run.bytes_of_only({1, 2, 3}) == sum(info.bytes for info in run.steps())
        for path in (tmp_path / "step-00000001").iterdir():
            path.unlink()
        assert [info.shared_bytes for info in manager.steps()] == [0, 0, shared]


def test_what_a_removal_frees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a promise of space that a removal does not free, because another step has the same file; and a report of such space."""
    model = make_model()
    with manager_of(tmp_path, keep_last=1) as manager:
        train(manager, model, 1)
        monkeypatch.setattr(Directory, "free_bytes", lambda self: 100)
        whole = (tmp_path / "step-00000001" / "model.safetensors.index.json").stat().st_size + 2 * file_of(
            tmp_path, 1
        ).stat().st_size
        with pytest.raises(shardsave.OutOfSpaceError, match=rf"removes step 1 and frees at most {whole / 1000:.1f} kB"):
            train(manager, model, 2)
        os.link(file_of(tmp_path, 1), tmp_path / "elsewhere")  # a checkpoint outside of the run has it too
        with pytest.raises(
            shardsave.OutOfSpaceError, match=rf"frees at most {(whole - file_of(tmp_path, 1).stat().st_size) / 1000:.1f} kB"
        ):
            train(manager, model, 2)
