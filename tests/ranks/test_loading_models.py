"""Loads on several ranks that do not all hold the same, and files of all writers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sharded import RANKS, SHARDINGS, Net, check_equal, rows, whole
from test_loading import set_thresholds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardsave
from jobs import run_ranks
from rank_files import cut, save_ranks
from support import same_state


def load_replicas(rank: int, folder: str) -> shardsave.LoadReport:
    set_thresholds(small=True)
    net = Net(seed=1)
    with recorded() as records:
        report = shardsave.load_model(nn.parallel.DistributedDataParallel(net), folder, process_group=dist.group.WORLD)
    assert same_state(net, Net()) and len(records) == (1 if rank == 0 else 0)
    unverified = Net(seed=1)
    assert not shardsave.load_model(unverified, folder, verify=False, process_group=dist.group.WORLD).verified
    assert same_state(unverified, Net())
    return report


@contextmanager
def recorded() -> Iterator[list[logging.LogRecord]]:
    """The records that are logged within the context."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("shardsave")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)


def test_replicas(tmp_path: Path) -> None:
    """Catches replicas (DDP) that each read all files or do not get all values, and loads that every rank logs."""
    saved = shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    reports = run_ranks(RANKS, load_replicas, str(tmp_path / "ckpt"))
    assert {report.bytes for report in reports} == {saved.bytes} == {sum(report.rank_bytes for report in reports)}
    assert max(report.rank_bytes for report in reports) < saved.bytes / 2


class Stage(nn.Module):
    """One stage of a pipeline, with the layers of its rank by their names in the whole model, or with some of the experts."""

    def __init__(self, layers: list[int], *, everywhere: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): _layer(n) for n in layers})
        if everywhere:
            torch.manual_seed(7)
            self.router = nn.Linear(8, 4)


def _layer(number: int) -> nn.Linear:
    torch.manual_seed(100 + number)
    return nn.Linear(8, 3 + number)


def load_stage(rank: int, folder: str) -> tuple[int, int]:
    """Ranks 0 and 1 are one stage, ranks 2 and 3 another; each stage is sharded over its two ranks."""
    set_thresholds(small=True)
    layers = ([0, 1], [2, 3])[rank // 2]
    expected = Stage(layers)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shard"))["shard"]
    net = Stage(layers)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    fully_shard(net, mesh=mesh)
    report = shardsave.load_model(net, folder, process_group=dist.group.WORLD, strict=False)
    check_equal(net, expected)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    smaller = shardsave.load_model(net, folder, process_group=half, strict=False)
    check_equal(net, expected)
    alone = Stage([rank], everywhere=rank % 2 == 0)  # experts: other tensors on each rank, some on several
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.zero_()
    shardsave.load_model(alone, folder, process_group=dist.group.WORLD, strict=False)
    assert same_state(alone, Stage([rank], everywhere=rank % 2 == 0))
    return report.bytes, smaller.bytes


def test_stages_and_experts(tmp_path: Path) -> None:
    """Catches ranks that expect all others to hold the same names, and a group that is not that of all ranks."""
    model = Stage([0, 1, 2, 3])
    saved = shardsave.save(model, tmp_path / "ckpt", durable=False)
    of_stage = [sum(t.nbytes for t in Stage(layers).state_dict().values()) for layers in ([0, 1], [2, 3])]
    figures = run_ranks(RANKS, load_stage, str(tmp_path / "ckpt"))
    assert figures == [(saved.bytes, of_stage[rank // 2]) for rank in range(RANKS)]


def _with_empty_ones() -> dict[str, torch.Tensor]:
    """Each empty tensor begins in its file where the one after it does, which has another shape."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(4):
        tensors[f"empty{number}"] = torch.zeros(number, 0, 3)
        tensors[f"full{number}"] = torch.arange(5.0 + number)
    return tensors


def load_empty_ones(rank: int, folder: str) -> tuple[int, bool | None]:
    """Rank 0 has the empty tensors, rank 1 the others, ranks 2 and 3 have all."""
    module, expected = nn.Module(), _with_empty_ones()
    for name, tensor in expected.items():
        if rank > 1 or name.startswith("empty") == (rank == 0):
            module.register_buffer(name, torch.full_like(tensor, 7))
    report = shardsave.load_model(module, folder, process_group=dist.group.WORLD, strict=False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.named_buffers())
    return report.tensors, report.verified


def test_empty_tensors(tmp_path: Path) -> None:
    """Catches an empty tensor of one rank that is taken for the tensor of another rank at the same offset, which then stays as it was."""
    shardsave.save(_with_empty_ones(), tmp_path / "ckpt", durable=False)
    assert run_ranks(RANKS, load_empty_ones, str(tmp_path / "ckpt")) == [(4, True), (4, True), (8, True), (8, True)]


def resume_stage(rank: int, folder: str) -> tuple[str, str, str, tuple[str, ...]]:
    """Ranks 0 and 1 are the first stage of a pipeline, ranks 2 and 3 the second."""
    layers = ([0, 1], [2, 3])[rank // 2]
    net = Stage(layers)
    optimizer = torch.optim.AdamW(net.parameters())
    with shardsave.CheckpointManager(folder, save_every=None, durable=False, process_group=dist.group.WORLD) as manager:
        manager.save(1, net, training={"optimizer": shardsave.PerRank(optimizer)})
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        resumed = manager.resume(net, training={"optimizer": shardsave.PerRank(optimizer)})
    assert resumed is not None and resumed.report.unexpected == () and same_state(net, Stage(layers))
    step = f"{folder}/step-00000001"
    lenient = shardsave.load_model(net, step, strict=False, process_group=dist.group.WORLD)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as of_job:
        shardsave.load_model(Stage([min(layers[0], 1)]), step, process_group=dist.group.WORLD)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as at_resume:
        shardsave.resume(step, Stage([0, 1]), process_group=dist.group.WORLD)
    with pytest.raises(shardsave.IncompatibleCheckpointError) as alone:
        shardsave.load_model(net, step)
    return str(of_job.value), str(at_resume.value), str(alone.value), lenient.unexpected


def test_stages_fill_their_parts(tmp_path: Path) -> None:
    """Catches a strict load that takes the layers of other stages for surplus, or does not notice layers that no stage has."""
    folder = str(tmp_path / "run")
    wanted = f"cannot load {folder}/step-00000001: the module's names and shapes were expected, there are"
    words = run_ranks(RANKS, resume_stage, folder)
    for rank, (of_job, at_resume, alone, unexpected) in enumerate(words):
        others = ([2, 3], [0, 1])[rank // 2]
        assert of_job == f"{wanted} 4 not in the module: {_names([2, 3])}; the module is unchanged"
        assert at_resume == of_job
        assert alone == (
            f"{wanted} 4 not in the module: {_names(others)}; if other ranks hold these, load with a process_group= that has all of them; "
            f"the module is unchanged"
        )
        assert unexpected == ()


def _names(layers: list[int]) -> str:
    return ", ".join(f"layers.{layer}.{name}" for layer in layers for name in ("bias", "weight"))


class Uneven(torch.Tensor):
    """A tensor that tells its boxes to a distributed checkpoint, as Megatron-FSDP's uneven parts do."""

    @staticmethod
    def __new__(cls, local: torch.Tensor, begin: int, shape: tuple[int, ...]) -> Uneven:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, local: torch.Tensor, begin: int, shape: tuple[int, ...]) -> None:
        self.local, self.begin = local, begin

    def to_local(self) -> torch.Tensor:
        return self.local

    def __create_chunk_list__(self) -> list[Any]:
        return [SimpleNamespace(offsets=torch.Size([self.begin, 0]), sizes=self.local.shape)]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def load_uneven(rank: int, folder: str) -> list[list[float]]:
    net = nn.Module()
    begins = [0, 5, 5, 6, 10]
    local = torch.zeros(begins[rank + 1] - begins[rank], 2)
    net.register_buffer("weight", Uneven(local, begins[rank], (10, 2)))
    shardsave.load_model(net, folder, process_group=dist.group.WORLD)
    return local.tolist()


def test_tensors_that_list_their_boxes(tmp_path: Path) -> None:
    """Catches rows that an uneven part does not get, or that go to a rank whose part is empty."""
    values = torch.arange(20.0).view(10, 2)
    shardsave.save({"weight": values}, tmp_path / "ckpt", durable=False)
    parts = run_ranks(RANKS, load_uneven, str(tmp_path / "ckpt"))
    assert [row for part in parts for row in part] == values.tolist()


def load_in_other_ways(rank: int, folder: str) -> None:
    """Loads files of other writers, in other dtypes, by some of the ranks."""
    set_thresholds(small=True)
    expected = Net()
    for path in ("rank files", "plain.safetensors"):
        for name in ("rows", "columns", "rows over tensor parallel", "strided"):
            net = Net(seed=1).requires_grad_(False)
            net.up.requires_grad_(True)
            SHARDINGS[name](net)
            shardsave.load_model(net, f"{folder}/{path}")
            assert net.up.weight.requires_grad and not net.down.weight.requires_grad  # these files know no flags
            check_equal(net, _with_flags_of(expected, net), f"{path}, {name}")
    untied = Net(seed=1)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    SHARDINGS["columns"](untied)
    report = shardsave.load_model(untied, f"{folder}/ckpt")  # one stored tensor for two of the module
    assert report.bytes == shardsave.inspect(f"{folder}/ckpt").bytes
    for weight in (untied.head.weight, untied.embed.weight):
        assert torch.equal(whole(weight.detach()), expected.embed.weight)
    wide = Net(seed=1).double()
    SHARDINGS["rows"](wide)
    report = shardsave.load_model(wide, f"{folder}/ckpt")
    check_equal(wide, Net().double())
    assert any("cast from float32 to float64" in note for note in report.notes)
    inner = nn.Linear(16, 13)
    shardsave.load_model(inner, f"{folder}/ckpt", prefix="up.", process_group=dist.group.WORLD)
    assert same_state(inner, Net().up)
    if rank < 2:
        pair = dist.new_group([0, 1], use_local_synchronization=True)
        half = Net(seed=1)
        rows(half, mesh=DeviceMesh.from_group(pair, "cpu"))
        shardsave.load_model(half, f"{folder}/ckpt", process_group=pair)
        check_equal(half, Net())


def _with_flags_of(expected: nn.Module, module: nn.Module) -> nn.Module:
    for parameter, like in zip(expected.parameters(), module.parameters()):
        parameter.requires_grad_(like.requires_grad)
    return expected


def test_files_of_all_writers(tmp_path: Path) -> None:
    """Catches chunks of other ranks that are placed wrongly, values that are not cast, and flags that are invented."""
    net = Net()
    shardsave.save(net, tmp_path / "ckpt", durable=False)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    save_ranks(tmp_path / "rank files", state, {name: cut(t, *range(min(t.dim(), 2))) for name, t in state.items()})
    save_file(state, tmp_path / "plain.safetensors")
    run_ranks(RANKS, load_in_other_ways, str(tmp_path))


class Renames(nn.Module):
    """A sub-module with a loading routine of its own, as older versions of models have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "scale"] = state.pop(prefix + "gamma")
        super()._load_from_state_dict(state, prefix, *rest)


def load_with_routine(rank: int, folder: str) -> str:
    net = nn.Sequential(nn.Linear(3, 3), Renames())
    fully_shard(net[0], mesh=init_device_mesh("cpu", (RANKS,)))
    shardsave.load_model(net, folder)
    assert net[1].scale.tolist() == [2.0] * 3 and net[0].weight.full_tensor().tolist() == torch.eye(3).tolist()
    fully_shard(net[1], mesh=init_device_mesh("cpu", (RANKS,)))
    with pytest.raises(shardsave.UnsupportedTensorError) as caught:
        shardsave.load_model(net, folder)
    return str(caught.value)


def test_modules_that_load_themselves(tmp_path: Path) -> None:
    """Catches a loading routine that is given parts of tensors, and FSDP's own hooks that count as one."""
    state = {"0.weight": torch.eye(3), "0.bias": torch.zeros(3), "1.gamma": torch.full((3,), 2.0)}
    shardsave.save(state, tmp_path / "ckpt", durable=False)
    (message,) = {*run_ranks(RANKS, load_with_routine, str(tmp_path / "ckpt"))}
    assert "cannot fill '1.scale'" in message and "loads itself" in message and message.endswith("the module is unchanged")
