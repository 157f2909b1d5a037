"""Training documents that come from anywhere: whatever they hold, one of our errors is raised, and nothing is changed by a plan.

Method: one value after the other in a document of every kind of leaf is replaced by each of many wrong ones.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

import shardsave
from training_state import edit_training, training_directory


def nested(levels: int, tag: str = "list") -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {tag: [value] if tag != "dict" else {"x": value}}
    return value


WRONG: list[Any] = [
    None, True, -1, 10**300, 1.5, "x", "", [], {}, [[]], {"tensor": "none"}, {"tensor": 3}, {"tensor": "t", "on": 5}, {"array": None},
    {"dict": []}, {"list": {}}, {"pairs": [[1]]}, {"pairs": [[{"list": []}, 1]]}, {"pairs": [[1, 2], [True, 3]]}, {"set": [{"dict": {}}]},
    {"float": "one"}, {"complex": [1]}, {"bytes": "%"}, {"bytes": 3}, {"dtype": "Tensor"}, {"dtype": 3}, {"device": "cuda:99999999"},
    {"size": [-1]}, {"size": [10**300]}, {"scalar": ["int8", 300]}, {"scalar": ["O", 1]}, {"scalar": ["float32", "x"]}, {"other": 1},
    {"tuple": [], "list": []}, {"per_rank": "none"}, {"subclass": {}}, {"optimizer": {}}, {"module": {"class": 1}}, {"object": []},
    {"tensor": "t", "placements": 5}, {"tensor": "t", "placements": ["shard"]}, {"tensor": "t", "placements": ["replicate"] * 99},
    {"boxes": {}}, {"boxes": {"shape": [2], "dtype": "float32", "placements": [], "parts": []}},
    {"generator": {"class": "torch.Generator", "state": 3}}, nested(120), nested(300, "dict"), {"names": 3},
]  # fmt: skip


def make() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.2}], 0.1, momentum=0.9
    )
    lambdas = [LambdaLR(optimizer, lambda step: 0.5**step) for _ in range(2)]
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    training = {
        "optimizer": optimizer,
        "scheduler": SequentialLR(optimizer, lambdas, [3]),
        "ema": AveragedModel(model),
        "generators": [torch.Generator(), np.random.default_rng(1), random.Random(2)],
        "own": shardsave.PerRank({"t": torch.ones(2), "a": np.ones(2)}),
        "values": {"a": [1, 2.5, None, {"b": (1, 2)}], "k": {1: np.float32(2)}},
        "epoch": 1,
    }
    return model, training


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value[:8]):  # the state of a generator has hundreds of numbers
            yield from places(item, (*path, at))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copied = dict(document) if isinstance(document, dict) else list(document)
    copied[path[0]] = changed(document[path[0]], path[1:], value)
    return copied


def everything(model: nn.Module, training: dict[str, Any]) -> str:
    own = training["own"].value
    states = [training[name].state_dict() for name in ("optimizer", "scheduler", "ema")]
    numbers = [g.get_state().sum() if isinstance(g, torch.Generator) else 0 for g in training["generators"]]
    process = hash(random.getstate()), torch.get_rng_state().sum(), np.random.get_state()[2]  # type: ignore[index]
    return repr((model.state_dict(), states, own, training["generators"][2].getstate()[1][:3], numbers, process))


def in_checkpoint(folder: Path, part: str) -> Any:
    """``part``, "shared" or "leaves", of the documents in ``folder``."""
    name = "index.json" if part == "shared" else "rank-00000.json"
    return json.loads((training_directory(folder) / name).read_bytes())[part]


def put(folder: Path, part: str, value: Any) -> None:
    """Replaces ``part``, "shared" or "leaves", in the documents in ``folder``."""
    name = "index.json" if part == "shared" else "rank-00000.json"
    edit_training(folder, lambda document: document.update({part: value}), name)


@pytest.mark.slow
def test_one_wrong_value_anywhere(tmp_path: Path) -> None:
    """Catches another exception than ours, a change before the error, and a document that is believed where it is wrong."""
    model, training = make()
    shardsave.save(model, tmp_path, training=training, rng=True, durable=False)
    before = everything(model, training)
    refused = accepted = 0
    generator = random.Random(1)
    for part in ("shared", "leaves"):
        whole = in_checkpoint(tmp_path, part)
        for path in places(whole):
            for wrong in generator.sample(WRONG, 3):
                put(tmp_path, part, changed(whole, path, wrong))
                try:
                    shardsave.resume(tmp_path, model, training=training, rng=True)
                except shardsave.ShardSaveError as error:
                    refused += 1
                    is_unchanged = str(error).endswith(("nothing was changed", "nothing else of the training state was read"))
                    assert is_unchanged or "the training state is partly restored" in str(error), (path, wrong, error)
                    assert len(str(error)) < 1500, (path, wrong, error)
                    assert not is_unchanged or everything(model, training) == before, (path, wrong)
                else:
                    accepted += 1
                    is_unchanged = False
                if not is_unchanged:
                    for seed in (random.seed, np.random.seed):
                        seed(0)
                    model, training = make()
                    before = everything(model, training)
        put(tmp_path, part, whole)
    assert refused > 300 and accepted > 10


@pytest.mark.parametrize("shared", [{"other": 1}, [], nested(5), {"dict": {"optimizer": 3}}, 5])
def test_a_wrong_structure(tmp_path: Path, shared: Any) -> None:
    """Catches a document of another structure that is taken as one without leaves."""
    model, training = make()
    shardsave.save(model, tmp_path, training=training, durable=False)
    put(tmp_path, "shared", shared)
    with pytest.raises((shardsave.CorruptCheckpointError, shardsave.IncompatibleCheckpointError), match="nothing was changed"):
        shardsave.resume(tmp_path, model, training=training)


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "ema", "generators"])
def test_a_long_name_of_a_class(tmp_path: Path, name: str) -> None:
    """Catches a message of a megabyte, from a class name in the document."""
    model, training = make()
    shardsave.save(model, tmp_path, training=training, durable=False)
    shared = in_checkpoint(tmp_path, "shared")
    leaf = shared["dict"][name] if name != "generators" else shared["dict"][name]["list"][0]
    next(iter(leaf.values()))["class"] = "E" * 1_000_000
    put(tmp_path, "shared", shared)
    for asked in ({**training, name: 3}, training):
        try:
            shardsave.resume(tmp_path, model, training=asked)
        except shardsave.ShardSaveError as error:
            assert len(str(error)) < 1000
        else:
            assert name == "ema" and asked is training  # the class of a module is not compared


def test_keys_that_collide(tmp_path: Path) -> None:
    """Catches a mapping whose keys all have the same hash: building it would take minutes."""
    shardsave.save({}, tmp_path, training={"a": 1}, durable=False)
    keys = [at * ((1 << 61) - 1) for at in range(40_000)]
    put(tmp_path, "shared", {"dict": {"a": {"pairs": [[key, 1] for key in keys]}}})
    started = time.monotonic()
    with pytest.raises(shardsave.CorruptCheckpointError, match="keys that are different were expected"):
        shardsave.resume(tmp_path, training={"a": 1})
    assert time.monotonic() - started < 10


def test_a_state_of_another_parameter(tmp_path: Path) -> None:
    """Catches state by a name that is in no group, and a group without the parameters that it names."""
    model, training = make()
    shardsave.save(model, tmp_path, training=training, durable=False)
    shared = in_checkpoint(tmp_path, "shared")
    state = shared["dict"]["optimizer"]["optimizer"]["state"]
    state["2.weight"] = state.pop("0.weight")
    put(tmp_path, "shared", shared)
    with pytest.raises(
        shardsave.CorruptCheckpointError, match="the state of a parameter of a group was expected, it is '2.weight'"
    ):
        shardsave.resume(tmp_path, model, training=training)
