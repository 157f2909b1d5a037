"""How a save is staged: what is copied in the call, what is read later, and why."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import shardsave
from background.saving import save_behind
from support import SmallModel, same_bits


def test_a_snapshot_is_of_the_moment_of_the_call(tmp_path: Path) -> None:
    """Catches a snapshot that reads memory after the call."""
    model = SmallModel()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save = save_behind(model, tmp_path / "ckpt", staging="snapshot")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.add_(1)
    save.wait()
    stored = shardsave.load(tmp_path / "ckpt")
    assert stored.keys() == expected.keys()
    assert all(same_bits(stored[name], expected[name]) for name in expected)
    assert save.staging.staged.is_set()


def test_ring(tmp_path: Path) -> None:
    """Catches."""
    model = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 600)).sum().backward()
    optimizer.step()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save = save_behind(model, tmp_path / "ckpt", [optimizer])
    assert save.staging.mode == "ring"
    print(save.staging.reason, save.staging.copied_bytes, save.staging.drained_bytes)
    save.wait()
    stored = shardsave.load(tmp_path / "ckpt")
    assert all(same_bits(stored[name], expected[name]) for name in expected)
