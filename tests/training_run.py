"""A run of steps for tests: a model whose weights are the number of its step, and a manager that does not wait for the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardsave

INDEX = "model.safetensors.index.json"


def model(value: float = 0.0) -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(value)
    return layer


def value_of(layer: nn.Linear) -> float:
    """The one value of all its weights."""
    (value,) = {*layer.weight.flatten().tolist(), *layer.bias.tolist()}
    return float(value)


def manager_of(folder: Path, **options: Any) -> shardsave.CheckpointManager:
    return shardsave.CheckpointManager(folder, **{"save_every": 10, "durable": False, "progress": False, **options})


def train(manager: shardsave.CheckpointManager, first: int, last: int) -> list[int]:
    """Steps of a training whose weights are the number of the step. Returns which were saved."""
    return [step for step in range(first, last + 1) if manager.step(step, model(step), metrics={"loss": 100.0 / step})]


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def flip(folder: Path, step: int) -> None:
    """Changes the last byte of a step's data."""
    (shard,) = path_of(folder, step).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")


def value_of_step(folder: Path, step: int) -> float:
    fresh = model()
    shardsave.load_model(fresh, path_of(folder, step))
    return value_of(fresh)
