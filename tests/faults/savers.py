"""What the fault tests save, and how they judge a directory afterwards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

import shardsave

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

#: With it, what is saved is a transformers model whose config tells the generation too.
WITH_CONFIG = bool(os.environ.get("SHARDSAVE_FAULTS_WITH_CONFIG"))


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


def model_with_config(generation: int) -> nn.Module:
    """The same tensors in a transformers model."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PreTrainedConfig(generation=generation))
            for name, tensor in state(generation).items():
                self.register_parameter(name, nn.Parameter(tensor))

    return Model()


def save(generation: int, folder: Path, durable: bool = True, with_config: bool = WITH_CONFIG) -> shardsave.SaveReport:
    """Two shards, and an architecture and its tensors or a config."""
    source = (model_with_config if with_config else model)(generation)
    architecture = not with_config
    return shardsave.save(source, folder, max_shard_size=5000, architecture=architecture, durable=durable, progress=False)


def generation_in(folder: Path) -> int | None:
    """Which generation the directory holds, whole and bit for bit; None where there is no checkpoint.

    A config beside it is whole, and of the same generation, or `inspect` says that it is not.
    """
    found = with_config_in(folder)
    return int(found.split()[0]) if isinstance(found, str) else found


def with_config_in(folder: Path) -> int | str | None:
    """As `generation_in`, and ``"2 with the config of 1"`` where a reader is told that the config is another one."""
    generation = loaded_generation(folder)
    if generation is None:
        return None
    info, path = shardsave.inspect(folder), folder / CONFIG
    if info.parts:
        assert built_generation(folder) == generation
    if not info.companions:
        return generation
    try:
        of_config = json.loads(path.read_text())["generation"] if path.exists() else None
    except ValueError as error:
        raise AssertionError("half a config") from error
    if of_config == generation:
        assert not info.notes
        return generation
    assert info.notes, (of_config, generation)
    return f"{generation} with the config of {of_config}"


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
    assert not info.notes, info.notes
    return set(os.listdir(folder)) - {INDEX, *info.shards, *info.parts.values(), *info.companions}


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
