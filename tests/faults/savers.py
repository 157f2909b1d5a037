"""The checkpoints that fault tests save, and how they judge a directory afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import shardsave
from training_state import MOMENT, names_of_training, save_with_training, training_generation

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
COMPANIONS = (CONFIG, "adapter_config.json", "adapter_model.safetensors")

#: What is saved: "plain" (a module and its architecture), "config" (a transformers model), "adapter" (of a PEFT model), "links" (as
#: "plain", in the place of symbolic links), or "training" (tensors and a training state, which generation 1 lacks in "training-new", and
#: the others in "training-gone"). Files of fixed names beside the weights contain the generation too, as does the training state.
#: "reuse": the tensors of one shard are the same in each generation; "reuse-step": so they are, and a save takes them from a checkpoint
#: of generation 1 in the directory `EARLIER` beside it.
KIND = os.environ.get("SHARDSAVE_FAULTS_KIND", "plain")


EARLIER = "earlier"


def state(generation: int, half: bool = KIND.startswith("reuse")) -> dict[str, torch.Tensor]:
    """Four tensors for two shards; every value is the generation, with ``half`` only in the first shard."""
    return {f"t{n}": torch.full((500 + n,), float(-1 if half and n > 1 else generation)) for n in range(4)}


@cache
def model(generation: int) -> nn.Module:
    """The same tensors in a module, and one more that is saved with its architecture."""
    module = nn.Module()
    for name, tensor in state(generation).items():
        module.register_parameter(name, nn.Parameter(tensor))
    module.register_buffer("scratch", torch.full((3,), float(generation)), persistent=False)
    return module


@cache
def model_with_config(generation: int) -> nn.Module:
    """The same tensors in a transformers model."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class Model(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(PreTrainedConfig(generation=generation))
            for name, tensor in state(generation).items():
                self.register_parameter(name, nn.Parameter(tensor))

    return Model()


@cache
def model_with_adapter(generation: int) -> nn.Module:
    """Two layers with a LoRA of four tensors."""
    import peft

    base = nn.Module()
    for number in range(2):
        base.add_module(f"layer{number}", nn.Linear(100 + number, 4))
    config = peft.LoraConfig(r=8, target_modules=["layer0", "layer1"], lora_alpha=generation)
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.fill_(generation)
    return adapted


def save(generation: int, folder: Path, durable: bool = True, kind: str = KIND) -> shardsave.SaveReport:
    """Saves two shards with an architecture and its tensors, or with a config; or one shard of an adapter with its two files.

    Waits until removed files are freed, so that the calls of the thread that frees them are among those of the save.
    """
    if kind.startswith("training"):
        return _save_training(generation, folder, durable, kind)
    if kind.startswith("reuse"):
        return _save_reusing(generation, folder, durable)
    source = {"plain": model, "links": model, "config": model_with_config, "adapter": model_with_adapter}[kind](generation)
    options = {"architecture": kind in ("plain", "links"), "adapter_only": kind == "adapter"}
    report = shardsave.save(source, folder, max_shard_size=5000, durable=durable, progress=False, **options)
    assert report.wait_cleaned(60)
    return report


def _save_reusing(generation: int, folder: Path, durable: bool) -> shardsave.SaveReport:
    report = shardsave.save(
        state(generation),
        folder,
        max_shard_size=5000,
        durable=durable,
        progress=False,
        reuse=earlier_for(folder),
    )
    assert report.wait_cleaned(60)
    return report


def earlier_for(folder: Path) -> Path | None:
    """The checkpoint from which a save into ``folder`` takes shards, if that is not the one that it replaces."""
    return folder.parent / EARLIER if KIND == "reuse-step" and folder.name != EARLIER else None


def _save_training(generation: int, folder: Path, durable: bool, kind: str) -> shardsave.SaveReport:
    """The metadata say whether there is a training state: so a checkpoint that has lost it, or has another one, is noticed."""
    is_with = kind == "training" or (kind == "training-gone") == (generation == 1)
    metadata = {"trained": is_with}
    if is_with:
        moment = MOMENT._replace(step=generation)
        report = save_with_training(state(generation), folder, generation, durable=durable, moment=moment, metadata=metadata)
    else:
        report = shardsave.save(
            state(generation), folder, max_shard_size=5000, durable=durable, progress=False, metadata=metadata
        )
    assert report.wait_cleaned(60)
    return report


def generation_in(folder: Path) -> int | None:
    """The generation of the checkpoint in ``folder``, which is whole bit for bit; None where there is no checkpoint.

    Files beside the weights are whole, and of the same generation, or a note of `inspect` names them.
    """
    generation = with_companions_in(folder)
    return int(generation.split()[0]) if isinstance(generation, str) else generation


def with_companions_in(folder: Path) -> int | str | None:
    """As `generation_in`, or ``"2 with config.json of 1"`` where a note says that a file beside the weights is another one."""
    generation = loaded_generation(folder)
    if generation is None:
        for name in COMPANIONS:
            companion_generation(folder / name)
        return None
    info = shardsave.inspect(folder)
    assert ("training state" in info.parts) == info.metadata.get("trained", False)
    if "training state" in info.parts:
        assert training_generation(folder) == generation
    if "architecture" in info.parts:
        assert built_generation(folder) == generation
    if not info.companions:
        return generation
    generations = {name: companion_generation(folder / name) for name in sorted(info.companions)}
    assert all(one is None or one <= generation for one in generations.values()), (
        "of a save that was not committed",
        generation,
        generations,
    )
    others = [f"{name} of {one}" for name, one in generations.items() if one != generation]
    assert [note.split()[0] for note in info.notes] == [other.split()[0] for other in others], (generations, info.notes)
    return f"{generation} with {' and '.join(others)}" if others else generation


def companion_generation(path: Path) -> int | None:
    """The generation of a file beside the weights, which is whole; None where there is none."""
    if not path.exists():
        return None
    try:
        if path.suffix == ".safetensors":
            return generation_of(load_file(path))
        values = json.loads(path.read_text())
    except (ValueError, SafetensorError) as error:
        raise AssertionError(f"half of {path.name}") from error
    return int(values["generation" if path.name == CONFIG else "lora_alpha"])


def loaded_generation(folder: Path) -> int | None:
    """The generation that a load returns, whole; None where there is no checkpoint."""
    try:
        loaded = shardsave.load(folder, progress=False)
    except shardsave.CheckpointNotFoundError:
        return None
    return generation_of(loaded)


def generation_of(loaded: Mapping[str, torch.Tensor]) -> int:
    """The generation of all tensors in ``loaded``, of a model or an adapter."""
    if "t0" in loaded:
        generation = int(loaded["t0"][0])
        expected = state(generation, half=int(loaded["t3"][0]) == -1)
    else:
        generation = int(loaded["base_model.model.layer0.lora_A.weight"][0, 0])
        shapes = {f"{n}.lora_{side}": shape for n in range(2) for side, shape in (("A", (8, 100 + n)), ("B", (4, 8)))}
        expected = {f"base_model.model.layer{name}.weight": torch.full(shapes[name], float(generation)) for name in shapes}
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    return generation


def built_generation(folder: Path) -> int:
    """The generation of the model that `build_model` returns, whole."""
    built = shardsave.build_model(folder, progress=False)
    generation = int(built.get_buffer("scratch")[0])
    expected = state(generation)
    assert all(torch.equal(built.state_dict()[name], expected[name]) for name in expected)
    assert torch.equal(built.get_buffer("scratch"), torch.full((3,), float(generation)))
    return generation


def litter_in(folder: Path) -> set[str]:
    """The names in the directory that belong to no checkpoint."""
    info = shardsave.inspect(folder)
    assert not info.notes, info.notes
    named = {INDEX, *info.shards, *info.parts.values(), *info.companions, *names_of_training(folder)}
    directories = {name.partition("/")[0] for name in named if "/" in name}
    found = {f"{directory}/{name}" for directory in directories for name in os.listdir(folder / directory)}
    return (found | set(os.listdir(folder)) - directories) - named


def next_save_works(folder: Path) -> None:
    """The save after an accident succeeds and leaves no litter; and the checkpoint stays, if one from which it took a shard is removed."""
    save(9, folder, durable=False)
    assert generation_in(folder) == 9
    assert not litter_in(folder), litter_in(folder)
    if (folder.parent / EARLIER).exists():
        shutil.rmtree(folder.parent / EARLIER)
        assert generation_in(folder) == 9


def copy_tree(source: Path, target: Path) -> None:
    """Copies a folder; names of one file are names of one file in the copy too."""
    copies: dict[int, str] = {}

    def copy(path: str, to: str) -> None:
        first = copies.setdefault(os.stat(path).st_ino, to)
        if first == to:
            shutil.copy2(path, to)
        else:
            os.link(first, to)

    shutil.copytree(source, target, copy_function=copy)


class Bench:
    """A directory that is reset for each trial: with a checkpoint of generation 1, or without (``first``)."""

    def __init__(self, folder: Path, first: bool) -> None:
        self.watched = folder / "watched"
        self.target = self.watched / "runs" / "ckpt"
        self.old = None if first else 1
        self._template = None if first else folder / "template"
        self._earlier = folder / EARLIER if KIND == "reuse-step" else None
        if self._earlier is not None:
            save(1, self._earlier)
        self._blobs: dict[Path, bytes] = {}  # what the files of the template lead to, if they are links
        if self._template is not None:
            save(1, self._template)
            if KIND == "links":
                self._replace_by_links(folder / "blobs")

    def _replace_by_links(self, blobs: Path) -> None:
        assert self._template is not None
        blobs.mkdir()
        for path in self._template.iterdir():
            path.rename(blobs / path.name)
            path.symlink_to(blobs / path.name)
            self._blobs[blobs / path.name] = path.read_bytes()

    def reset(self) -> None:
        shutil.rmtree(self.watched, ignore_errors=True)
        self.watched.mkdir()
        if self._template is not None:
            self.target.parent.mkdir()
            shutil.copytree(self._template, self.target, symlinks=True)
        if self._earlier is not None:
            shutil.copytree(self._earlier, self.target.parent / EARLIER)

    def found(self) -> int | None:
        if self._earlier is not None:
            assert generation_in(self.target.parent / EARLIER) == 1, "the earlier checkpoint was changed"
        assert all(path.read_bytes() == content for path, content in self._blobs.items()), "what a link leads to was changed"
        return generation_in(self.target)
