"""What the fault tests save, and how they judge a directory afterwards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn

import shardsave

INDEX = "model.safetensors.index.json"


def state(generation: int) -> dict[str, torch.Tensor]:
    """Four tensors for two shards; every value tells the generation."""
    return {f"t{n}": torch.full((500 + n,), float(generation)) for n in range(4)}


def model(generation: int) -> nn.Module:
    """The same tensors in a module, and one more that is kept with its architecture."""
    made = nn.Module()
    for name, tensor in state(generation).items():
        made.register_parameter(name, nn.Parameter(tensor))
    made.register_buffer("scratch", torch.full((3,), float(generation)), persistent=False)
    return made


def save(generation: int, folder: Path, durable: bool = True) -> shardsave.SaveReport:
    """Two shards, an architecture and its tensors."""
    return shardsave.save(model(generation), folder, max_shard_size=5000, architecture=True, durable=durable, progress=False)


def generation_in(folder: Path) -> int | None:
    """Which generation the directory holds, whole and bit for bit, whatever reads it; None where there is no checkpoint."""
    generation = loaded_generation(folder)
    if generation is not None and shardsave.inspect(folder).parts:
        assert built_generation(folder) == generation
    return generation


def loaded_generation(folder: Path) -> int | None:
    """Which generation a load gives, whole; None where there is no checkpoint."""
    try:
        loaded = shardsave.load(folder, progress=False)
    except shardsave.CheckpointNotFoundError:
        return None
    generation = int(loaded["t0"][0])
    expected = state(generation)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    return generation


def built_generation(folder: Path) -> int:
    """Which generation a build gives, whole."""
    built = shardsave.build_model(folder, progress=False)
    generation = int(built.get_buffer("scratch")[0])
    expected = state(generation)
    assert all(torch.equal(built.state_dict()[name], expected[name]) for name in expected)
    assert torch.equal(built.get_buffer("scratch"), torch.full((3,), float(generation)))
    return generation


def litter_in(folder: Path) -> set[str]:
    """What is in the directory and belongs to no checkpoint."""
    info = shardsave.inspect(folder)
    return set(os.listdir(folder)) - {INDEX, *info.shards, *info.parts.values()}


def next_save_works(folder: Path) -> None:
    """The save after an accident succeeds and leaves no litter."""
    save(9, folder, durable=False)
    assert generation_in(folder) == 9
    assert not litter_in(folder), litter_in(folder)


class Bench:
    """A directory that is as before for each trial: with a checkpoint of generation 1, or without (``first``)."""

    def __init__(self, folder: Path, first: bool) -> None:
        self.watched = folder / "watched"
        self.target = self.watched / "runs" / "ckpt"
        self.old = None if first else 1
        self._template = None if first else folder / "template"
        if self._template is not None:
            save(1, self._template)

    def reset(self) -> None:
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self._template is not None:
            self.target.parent.mkdir()
            shutil.copytree(self._template, self.target)

    def found(self) -> int | None:
        return generation_in(self.target)
