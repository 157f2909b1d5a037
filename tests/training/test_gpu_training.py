"""Training state on a real GPU: where state tensors go, and the generators of devices. Skipped if torch sees no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from support import same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def make(options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 4)).cuda()
    training = {"optimizer": torch.optim.AdamW(model.parameters(), 1e-2, **options), "scaler": torch.amp.GradScaler("cuda")}
    return model, training


def step(model: nn.Module, training: dict[str, Any]) -> None:
    optimizer, scaler = training["optimizer"], training["scaler"]
    optimizer.zero_grad()
    scaler.scale(model(torch.rand(8, 16, device="cuda")).pow(2).mean()).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=lambda options: next(iter(options))
)
def test_resumed_on_the_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    """Catches state on another device than torch would have it, and dropout that goes on with other numbers."""
    model, training = make(options)
    for _ in range(3):
        step(model, training)
    shardsave.save(model, tmp_path, training=training, rng=True, durable=False)
    for _ in range(3):
        step(model, training)
    again, resumed = make(options)
    torch.cuda.manual_seed(99)
    shardsave.resume(tmp_path, again, training=resumed, rng=True)
    for name, parameter in again.named_parameters():
        devices = {key: value.device for key, value in resumed["optimizer"].state[parameter].items()}
        assert devices == {key: value.device for key, value in training["optimizer"].state[model.get_parameter(name)].items()}
    for _ in range(3):
        step(again, resumed)
    assert all(same_bits(a, b) for a, b in zip(again.parameters(), model.parameters()))
