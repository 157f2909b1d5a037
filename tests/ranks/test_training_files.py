"""What several ranks write of a training state, and what one process does with it: verify, inspect, diff, convert, resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainings import TRAININGS, WHOLE, Training, adamw, differences, finished, net, sharded

import shardsave
from jobs import run_ranks
from shardsave._storage.open_checkpoint import open_checkpoint
from training_state import training_directory


class Shadow:
    """An average in an object with a state of its own."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.tensors = {name: parameter.detach() * factor for name, parameter in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "updates": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])


class Stage(nn.Module):
    """One stage of a pipeline: the names of its parameters are its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.add_module(f"layer{number}", nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def stages(seed: int) -> Training:
    """Two stages of two ranks each; the optimizer of each belongs to its ranks."""
    torch.manual_seed(seed)
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))
    model = fully_shard(Stage(rank // 2), mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = finished(model, {"optimizer": optimizer}, dist.group.WORLD)
    return training


def marked(training: Training) -> Training:
    """The same with its optimizer marked."""
    return training._replace(state={**training.state, "optimizer": shardsave.PerRank(training.state["optimizer"])})


def save_all(rank: int, folder: Path) -> dict[str, Any]:
    ends: dict[str, Any] = {}
    for name in ("rows", "hybrid", "data_parallel"):
        training = TRAININGS[name](0)
        training.steps(2)
        training.save(folder / name, max_shard_size="1kB")
        ends[name] = training.whole()
    training = TRAININGS["rows"](0)
    training.steps(1)
    pending = shardsave.save_async(training.model, folder / "async", training=training.state, rng=True)
    ends["async"] = training.whole()
    training.steps(2)
    pending.wait()
    training = stages(0)
    training.steps(2)
    marked(training).save(folder / "stages")
    training.steps(2)
    ends["stages"] = training.digest()
    model = sharded(net(0))
    ends["shadow"] = shadow = Shadow(model, 2.0)
    shardsave.save(model, folder / "shadow", training={"shadow": shadow}, durable=False)
    ends["shadow"] = {name: tensor.full_tensor() for name, tensor in shadow.tensors.items()}  # type: ignore[attr-defined]
    return ends


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("files")
    return folder, run_ranks(4, save_all, folder)


def resume_others(rank: int, folder: Path) -> dict[str, Any]:
    ends: dict[str, Any] = {}
    if dist.get_world_size() == 4:
        training = stages(3)
        resumed = marked(training).resume(folder / "stages", strict=False)  # which has the other stage too
        training.state["epoch"] = resumed.values["epoch"]
        training.steps(2)
        ends["stages"] = training.digest()
    training = TRAININGS["rows"](2)
    training.resume(folder / "async")
    ends["async"] = training.whole()
    model = sharded(net(1))
    shardsave.load_model(model, folder / "rows", part="ema", strict=False)
    ends["ema"] = {f"ema {name}": parameter.detach().full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    shadow = Shadow(model, 0.0)
    shardsave.resume(folder / "shadow", model, training={"shadow": shadow})
    ends["shadow"] = {name: tensor.full_tensor() for name, tensor in shadow.tensors.items()}  # type: ignore[attr-defined]
    return ends


@pytest.mark.parametrize("size", [4, 2])
def test_other_ways_to_save(saved: tuple[Path, list[dict[str, Any]]], size: int) -> None:
    """Catches parts of a rank's own optimizer that are mixed up, distributed tensors in the state of an object that become others, and a
    training state that goes on to change while it is saved."""
    folder, before = saved
    for rank, ends in enumerate(run_ranks(size, resume_others, folder)):
        assert differences(before[rank]["shadow"], ends["shadow"]) == []
        assert differences(before[rank]["async"], ends["async"]) == []
        assert differences({name: before[rank]["rows"][name] for name in ends["ema"]}, ends["ema"]) == []
        assert size != 4 or ends["stages"] == before[rank]["stages"]


def stored(folder: Path) -> dict[int, dict[str, int]]:
    """Rank → stored name → bytes, of what all ranks share."""
    found: dict[int, dict[str, int]] = {rank: {} for rank in range(4)}
    with open_checkpoint(folder, parts=["training state"]) as checkpoint:
        assert checkpoint.training is not None
        for name, located in checkpoint.training.stored.items():
            if not name.startswith("rank "):
                found[int(located.shard.rpartition("/rank-")[2][:5])][name] = located.nbytes
    return found


def test_each_box_once(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Catches a box that is written twice, or by another rank than the lowest that holds it, and a file that is larger than asked for."""
    folder, before = saved
    for name, writers in (("rows", {0, 1, 2, 3}), ("hybrid", {0, 1}), ("data_parallel", {0})):
        of_ranks = stored(folder / name)
        assert {rank for rank, tensors in of_ranks.items() if tensors} == writers, name
        names = ("state of ", "ema ")
        whole = [value.nbytes for key, value in before[0][name].items() if key.startswith(names) and torch.is_tensor(value)]
        assert sum(sum(tensors.values()) for tensors in of_ranks.values()) == sum(whole), name
        document = json.loads((training_directory(folder / name) / "index.json").read_bytes())
        assert document["ranks"] == 4 and document["requires"] == ([] if name == "data_parallel" else ["boxes"])


def test_one_process(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Catches a verb of one process that cannot read boxes, or does not keep them."""
    folder, before = saved
    for name in ("rows", "stages"):
        assert shardsave.verify(folder / name).verified
        assert shardsave.inspect(folder / name).ranks == 4
        assert shardsave.diff(folder / name, folder / name).same
        shardsave.convert(folder / name, tmp_path / name)
        assert shardsave.verify(tmp_path / name).verified and shardsave.diff(folder / name, tmp_path / name).same
    training = WHOLE["rows"](4)
    training.resume(tmp_path / "rows")
    assert differences(before[0]["rows"], training.whole()) == []
    training.state["optimizer"].state[training.model.up.weight]["exp_avg"][0, 0] += 1  # type: ignore[union-attr]
    training.save(tmp_path / "changed")
    report = shardsave.diff(tmp_path / "rows", tmp_path / "changed")
    assert report.training is not None
    assert {name for name in report.training.changed if not name.startswith("rank ")} == {"optimizer/up.weight/exp_avg"}


def save_on_one(rank: int, folder: Path) -> str:
    """A mesh of this process alone, and no other process that takes part."""
    model = sharded(net(0))
    training = finished(model, adamw(model))
    training.steps(1)
    training.save(folder)
    return (training_directory(folder) / "index.json").read_text()


def test_a_job_of_one(tmp_path: Path) -> None:
    """Catches boxes where nothing is in parts."""
    (document,) = run_ranks(1, save_on_one, tmp_path)
    assert '"ranks": 1' in document and [path.name for path in training_directory(tmp_path).glob("*.tensors")] == [
        "rank-00000-00001.tensors"
    ]
