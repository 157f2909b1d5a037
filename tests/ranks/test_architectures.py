"""Architectures that several ranks save: of a module that ``fully_shard`` alone has changed, that of the module before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from placements import PLACEMENTS
from test_failing_loads import raised
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, parallelize_module
from torch.nn.utils import parametrizations

import shardsave
from jobs import run_ranks
from support import same_bits


class Layer(nn.Module):
    """Has what else an architecture keeps: a computed weight, a hook that is a method, non-persistent buffers, tensors in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.first = self.normed
        self.table = torch.arange(4.0)
        self.rest = nn.ParameterList([torch.ones(3), torch.zeros(2)])
        self.register_buffer("scratch", torch.full((5,), 2.0), persistent=False)
        self.register_forward_pre_hook(self.noted)
        self.options = {"rows": (1, 2), "kind": nn.Linear}

    def noted(self, module: nn.Module, inputs: Any) -> None:
        """Does nothing."""

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.normed(inputs) + self.scratch.sum()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.normed(inputs) * self.rest[0].sum() + self.scratch.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(8, 8, bias=False)
        self.tail = nn.Linear(8, 8)
        self.tail.weight = self.head.weight
        self.layers[0].normed.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return self.tail(self.head(inputs))


def sharded(net: Net, **options: Any) -> Net:
    for layer in net.layers:
        fully_shard(layer.normed, **options)
        fully_shard(layer, **options)
        register_fsdp_forward_method(layer, "encode")
    fully_shard([net.head, net.tail], **options)
    fully_shard(net, **options)
    return net


def save_nets(rank: int, folder: Path) -> list[tuple[Any, ...]]:
    """Saves a net as it is on one rank, and sharded on all: before and after it has computed. What each save warned of, and its notes."""
    found = []
    for name, computed, options in (
        ("rows", False, {}),
        ("computed", True, {}),
        ("columns", False, {"shard_placement_fn": lambda p: Shard(1) if p.dim() > 1 and p.shape[1] == 8 else Shard(0)}),
        ("hybrid", False, {"mesh": init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("twice", "rows"))}),
    ):
        if rank == 0:
            shardsave.save(Net(), folder / name / "one", architecture=True, durable=False)
        net = sharded(Net(), **options)
        if computed:
            net(torch.ones(2, 8)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = shardsave.save(net, folder / name / "many", architecture=True, durable=False)
        found.append(([str(warning.message) for warning in caught], report.notes, report.trust))
    return found


def documents(folder: Path) -> tuple[bytes, ...]:
    """What the architecture document and the file of extra tensors of a checkpoint have in them."""
    return tuple(path.read_bytes() for path in sorted([*folder.glob("architecture-*.json"), *folder.glob("extra-*.tensors")]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_leaves_no_trace(ranks: int, tmp_path: Path) -> None:
    """Catches FSDP2's classes, hooks, methods and marks in a document, sharded parameters that are refused or take another name, ties that
    are lost, and extra tensors that several ranks write or leave out."""
    ends = run_ranks(ranks, save_nets, tmp_path)
    assert all(end == ends[0] for end in ends)
    for name, (warned, notes, trust) in zip(("rows", "computed", "columns", "hybrid"), ends[0], strict=True):
        assert (warned, notes) == ([], ())
        one, many = documents(tmp_path / name / "one"), documents(tmp_path / name / "many")
        assert len(one) == 2 and one == many, name
        built = shardsave.build_model(tmp_path / name / "many", trust=trust)
        assert type(built.layers[0]) is Layer and built.tail.weight is built.head.weight  # type: ignore[index,union-attr]
        plain = Net()
        assert same_bits(built(torch.ones(2, 8)), plain(torch.ones(2, 8)))
        flags = [p.requires_grad for p in plain.parameters()]
        assert [p.requires_grad for p in built.parameters()] == flags


def save_placed(rank: int, folder: Path, names: list[str]) -> None:
    for name in names:
        whole, placed = PLACEMENTS[name]()
        if rank == 0:
            shardsave.save(whole, folder / name / "one", architecture=True, durable=False)
        shardsave.save(placed, folder / name / "many", architecture=True, durable=False, max_shard_size="4kB")


PLAIN = ["uneven", "fewer_rows_than_ranks", "offloaded"]


@pytest.mark.parametrize("names", [PLAIN, pytest.param(["low_rank_adapters"], marks=pytest.mark.slow)], ids=["all", "PEFT"])
def test_placements(names: list[str], tmp_path: Path) -> None:
    """Catches a document that depends on how parameters are placed, or on adapters beside them."""
    run_ranks(4, save_placed, tmp_path, names)
    for name in names:
        one, many = documents(tmp_path / name / "one"), documents(tmp_path / name / "many")
        assert one and one == many, name
        info = shardsave.inspect(tmp_path / name / "many", architecture=True)
        assert info.architecture is not None
        built = shardsave.build_model(tmp_path / name / "many", trust=info.architecture.trust)
        loaded = shardsave.load(tmp_path / name / "one")
        assert all(same_bits(tensor, loaded[key]) for key, tensor in built.state_dict().items())


class Small(nn.Module):
    """Two layers and a buffer that is not saved as a weight."""

    def __init__(self, scratch: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)
        self.register_buffer("scratch", torch.full((3,), scratch), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs)) + self.scratch.sum()


def tensor_parallel(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    model = Small()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "tensors"))
    parallelize_module(model, mesh["tensors"], {"up": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["rows"]), {"architecture": True}


def inputs_prepared(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    """Only hooks are left of the parallelism; all parameters are those of ``fully_shard``."""
    model = Small()
    prepare = PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Shard(0),))
    parallelize_module(model, init_device_mesh("cpu", (4,)), prepare)
    return fully_shard(model), {"architecture": True}


def stage(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    model = Small()
    delattr(model, "up" if rank % 2 else "down")
    return model, {"architecture": True, "process_group": dist.group.WORLD}


def of_program(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    return fully_shard(Small()), {"program": ((torch.ones(1, 8),), {})}


def other_attribute(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    model = Small()
    model.number = rank // 3  # type: ignore[assignment]
    return fully_shard(model), {"architecture": True}


def drifted(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    return fully_shard(Small(scratch=float(rank == 2))), {"architecture": True}


def asked_by_one(rank: int) -> tuple[nn.Module, dict[str, Any]]:
    return fully_shard(Small()), {"architecture": rank != 1}


REFUSED: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "tensor parallel": (
        tensor_parallel,
        "UnsupportedModuleError",
        ("cannot save the architecture", "'up.weight' is split in another way", "save the architecture once"),
    ),
    "prepared inputs": (
        inputs_prepared,
        "UnsupportedModuleError",
        ("'Small' is split in another way", "before it is parallelised"),
    ),
    "a stage": (
        stage,
        "UnsupportedModuleError",
        ("all 4 tensors of the checkpoint was expected on each rank", "is not on every rank", "before it is divided"),
    ),
    "a program": (
        of_program,
        "UnsupportedModuleError",
        ("cannot save the program", "'up.weight' is spread", "before it is sharded"),
    ),
    "another attribute": (
        other_attribute,
        "ValueError",
        ("the same architecture was", "rank 3 has another than rank 0"),
    ),
    "an extra tensor that differs": (
        drifted,
        "UnsupportedTensorError",
        ("'scratch': the same values", "rank 2 and rank 0 differ"),
    ),
    "asked by one alone": (
        asked_by_one,
        "ValueError",
        ("the same architecture was", "it is there on rank 0, rank 2, rank 3, missing on rank 1"),
    ),
}


def refused(rank: int, folder: Path) -> list[tuple[str, str]]:
    errors = []
    for make, _, _ in REFUSED.values():
        model, options = make(rank)
        errors.append(raised(lambda model=model, options=options: shardsave.save(model, folder, durable=False, **options)))  # type: ignore[misc]
    return errors


def test_refusals(tmp_path: Path) -> None:
    """Catches a document of which no process could build the model, or one that is that of one rank alone, and errors without a way out, or
    that blame one rank for how all have divided the model."""
    first, *others = run_ranks(4, refused, tmp_path / "ckpt")
    assert all(other == first for other in others)
    for (case, (_, kind, words)), (error, message) in zip(REFUSED.items(), first, strict=True):
        assert error == kind and all(word in message for word in words), (case, error, message)
        assert error == "ValueError" or not message.startswith("rank"), (case, message)
    assert not (tmp_path / "ckpt").exists() or not [*(tmp_path / "ckpt").iterdir()]


def lowest_rank(rank: int, folder: Path) -> tuple[str, ...]:
    """Several ranks with plain tensors, of which the one that is no weight has drifted."""
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "on_divergence": "lowest_rank", "durable": False}
    return shardsave.save(Small(scratch=float(rank)), folder, architecture=True, **options).notes


def test_replicas_of_extra_tensors(tmp_path: Path) -> None:
    """Catches extra tensors that are those of any one rank, without a word."""
    for notes in run_ranks(2, lowest_rank, tmp_path):
        assert any("'scratch': the same values on all ranks" in note for note in notes)
    info = shardsave.inspect(tmp_path, architecture=True)
    assert info.architecture is not None
    built = shardsave.build_model(tmp_path, trust=info.architecture.trust)
    assert torch.equal(built.scratch, torch.zeros(3))  # type: ignore[arg-type]


def save_later(rank: int, folder: Path) -> None:
    shardsave.save_async(sharded(Net()), folder, architecture=True, durable=False).wait()


def test_in_the_background(tmp_path: Path) -> None:
    """Catches a document or an extra tensor that only a blocking save of several ranks has."""
    shardsave.save(Net(), tmp_path / "one", architecture=True, durable=False)
    run_ranks(2, save_later, tmp_path / "many")
    assert documents(tmp_path / "one") == documents(tmp_path / "many")
