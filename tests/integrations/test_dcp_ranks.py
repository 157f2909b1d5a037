"""Storage for torch.distributed.checkpoint on several ranks: one checkpoint of all of them, which any mesh reads."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_models import NESTED, PLACEMENTS, Model, columns, replicated, rows, same_files, training_of, whole
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardsave
from jobs import run_ranks
from shardsave.integrations.dcp import StorageReader, StorageWriter
from support import same_bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def save_all(rank: int, folder: Path, names: list[str]) -> list[Any]:
    reports = []
    for name in names:
        model = PLACEMENTS[name](Model())
        writer = StorageWriter(folder / name / "many", model, max_shard_size=500, metadata={"of": name}, durable=False)
        dcp.save(model.state_dict(), storage_writer=writer)
        assert writer.report is not None
        reports.append((writer.report.shards, writer.report.bytes, writer.report.bytes_written))
        if name in NESTED:
            tensors = model.state_dict()
            state = {"model": tensors, "optimizer": training_of(tensors), "step": 7, "pair": (torch.arange(3), "x")}
            writer = StorageWriter(folder / name / "nested", model, max_shard_size=500, durable=False)
            dcp.save(state, storage_writer=writer)
    return reports


def load_all(rank: int, folder: Path, names: list[str], placements: list[str]) -> list[str]:
    """What differs on this rank."""
    wrong = []
    expected = Model().state_dict()
    for name in names:
        for placement in placements:
            model = PLACEMENTS[placement](Model(seed=1))
            state = {"model": model.state_dict()}
            state["optimizer"] = training_of({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
            state |= {"step": 0, "pair": None}
            dcp.load(state, storage_reader=StorageReader(folder / name / "nested"))
            wrong += [
                f"{name} {placement} {key}"
                for key, value in state["model"].items()
                if not same_bits(whole(value), expected[key])
            ]
            moments = training_of(expected)["state"]
            for key, value in state["optimizer"]["state"].items():
                same = same_bits(whole(value["exp_avg"]), moments[key]["exp_avg"]) and value["step"] == 3
                wrong += [] if same else [f"{name} {placement} moment of {key}"]
            others = state["step"] == 7 and state["optimizer"]["param_groups"] == training_of(expected)["param_groups"]
            wrong += [] if others and torch.equal(state["pair"][0], torch.arange(3)) else [f"{name} {placement} values"]
            flat = PLACEMENTS[placement](Model(seed=1)).state_dict()
            dcp.load(flat, storage_reader=StorageReader(folder / name / "many"))
            wrong += [
                f"{name} {placement} flat {key}" for key, value in flat.items() if not same_bits(whole(value), expected[key])
            ]
    return wrong


def test_every_placement(tmp_path: Path) -> None:
    """Catches a box in the wrong place, a value or a flag of one rank alone, and files that differ from those of one process."""
    names = [*PLACEMENTS]
    reports = run_ranks(4, save_all, tmp_path, names)
    assert reports[0] == reports[3]
    for name in names:
        shardsave.save(Model(), tmp_path / name / "one", max_shard_size=500, metadata={"of": name}, durable=False)
        same_files(tmp_path / name / "one", tmp_path / name / "many")
    for name in NESTED:
        fresh = Model(seed=1).requires_grad_(True)
        assert shardsave.load_model(fresh, tmp_path / name / "nested").verified is True and not fresh.up.weight.requires_grad
        assert all(same_bits(value, Model().state_dict()[key]) for key, value in fresh.state_dict().items())
        assert shardsave.verify(tmp_path / name / "nested").verified is True
        assert shardsave.inspect(tmp_path / name / "nested").ranks == 4
    assert run_ranks(4, load_all, tmp_path, ["both"], ["rows", "hybrid", "replicated"]) == [[]] * 4
    assert run_ranks(2, load_all, tmp_path, ["columns"], ["rows", "tensor_parallel"]) == [[]] * 2


def reshard(rank: int, folder: Path) -> list[str]:
    """Every placement of a tensor on one mesh, read back in every other one on meshes of one and two dimensions."""
    wrong = []
    tensors = {f"t{n}": torch.arange(0, n * 7, dtype=torch.float32).reshape(n, 7) for n in (0, 1, 5, 8)} | {
        "scalar": torch.tensor(5.0)
    }
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    places = [(flat, (p,)) for p in (Replicate(), Shard(0), Shard(1))]
    places += [(square, (p, q)) for p in (Replicate(), Shard(0), Shard(1)) for q in (Replicate(), Shard(0), Shard(1))]

    def placed(mesh: Any, placements: Any, values: dict[str, torch.Tensor]) -> dict[str, Any]:
        fits = {
            name: [p if isinstance(p, Replicate) or tensor.dim() else Replicate() for p in placements]
            for name, tensor in values.items()
        }
        return {name: distribute_tensor(tensor, mesh, fits[name]) for name, tensor in values.items()}

    for number, (mesh, placements) in enumerate(places):
        dcp.save(placed(mesh, placements, tensors), storage_writer=StorageWriter(folder / str(number), durable=False))
        for other, others in random.Random(number).sample(places, 2):
            state = placed(other, others, {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()})
            dcp.load(state, storage_reader=StorageReader(folder / str(number)))
            wrong += [
                f"{placements} to {others}: {name}"
                for name, value in state.items()
                if not torch.equal(whole(value), tensors[name])
            ]
    return wrong


def test_resharding(tmp_path: Path) -> None:
    """Catches a box that is read from or to another place: rows, columns, both, replicas, parts that are empty or uneven."""
    assert run_ranks(4, reshard, tmp_path) == [[]] * 4


def read_once(rank: int, folder: Path) -> list[Any]:
    """Bytes that this rank read, and whether all were verified; then what it raises for a checkpoint with a wrong bit."""
    found: list[Any] = []
    for place in (rows, columns, replicated):
        state = place(Model(seed=1)).state_dict()
        reader = StorageReader(folder)
        dcp.load(state, storage_reader=reader)
        assert reader.report is not None
        found.append((reader.report.bytes, reader.report.verified))
    for reader, planner in ((StorageReader(folder / "damaged"), None), (StorageReader(folder), Blocks(2))):
        try:
            dcp.load(rows(Model(seed=1)).state_dict(), storage_reader=reader, planner=planner)
        except BaseException as error:
            found.append(str(error))
    return found


class Blocks(DefaultLoadPlanner):
    """Has no memory on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def resolve_tensor(self, item: Any) -> Any:
        if dist.get_rank() == self.rank:
            raise MemoryError("no memory")
        return super().resolve_tensor(item)


def test_each_byte_is_read_once(tmp_path: Path) -> None:
    """Catches ranks that all read the same, parts that nobody verifies, and an error that only one rank raises."""
    report = shardsave.save(Model(), tmp_path, durable=False)
    shutil.copytree(tmp_path, tmp_path / "damaged")
    shard = max((tmp_path / "damaged").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    loads = run_ranks(4, read_once, tmp_path)
    for number in range(3):
        assert sum(load[number][0] for load in loads) == report.bytes and all(load[number][1] is True for load in loads)
    assert all("corrupt shard" in load[3] and "has checksum" in load[3] for load in loads)
    assert all("rank 2: no memory" in load[4] or "MemoryError: no memory" in load[4] for load in loads)


def save_in_group(rank: int, folder: Path) -> str:
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
        model = fully_shard(Model(), mesh=mesh)
        writer = StorageWriter(folder, model, process_group=group)
        dcp.save(model.state_dict(), storage_writer=writer, process_group=group)
        for reader in (StorageReader(folder, process_group=group), StorageReader(folder)):
            state = fully_shard(Model(seed=1), mesh=mesh).state_dict()
            dcp.load(state, storage_reader=reader, process_group=group)
            assert all(same_bits(whole(value), Model().state_dict()[key]) for key, value in state.items())
        try:
            dcp.save(model.state_dict(), storage_writer=StorageWriter(folder / "wrong", model), process_group=group)
        except BaseException as error:
            return str(error)
    return ""


def test_a_group_smaller_than_the_world(tmp_path: Path) -> None:
    """Catches a writer that waits for ranks which DCP does not save on, and a group that was forgotten and is not told."""
    messages = run_ranks(4, save_in_group, tmp_path / "c")
    assert all(
        "process_group must be the group that DCP was called with, which has 2 processes" in messages[rank] for rank in (1, 3)
    )
    shardsave.save(Model(), tmp_path / "one")
    same_files(tmp_path / "one", tmp_path / "c")


def save_async(rank: int, folder: Path) -> list[bool]:
    model = rows(Model())
    state = {"model": model.state_dict(), "step": 3}
    future = dcp.async_save(state, storage_writer=StorageWriter(folder, model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.requires_grad_(True)
    future.result()
    return [fully.requires_grad for fully in model.parameters()]


def test_asynchronous_saves(tmp_path: Path) -> None:
    """Catches values or flags of a later moment, and a thread that waits for ranks in another order."""
    run_ranks(4, save_async, tmp_path)
    fresh = Model(seed=1)
    shardsave.load_model(fresh, tmp_path)
    assert all(same_bits(value, Model().state_dict()[key]) for key, value in fresh.state_dict().items())
    assert fresh.embed.weight.requires_grad and not fresh.up.weight.requires_grad


def stages(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)
    layer = nn.Linear(3, 3)
    layer.requires_grad_(rank % 2 == 0)
    state = {f"layers.{rank}.{name}": tensor for name, tensor in layer.state_dict().items()}
    model = nn.Module()
    model.layers = nn.ModuleDict({str(rank): layer})
    dcp.save(state | {f"loader.{rank}": rank}, storage_writer=StorageWriter(folder, model))


def test_ranks_with_other_names(tmp_path: Path) -> None:
    """Catches pipeline stages of which one is lost, and flags of ranks that have other parameters than rank 0."""
    run_ranks(3, stages, tmp_path)
    expected = {}
    for rank in range(3):
        torch.manual_seed(rank)
        expected |= {f"layers.{rank}.{name}": tensor for name, tensor in nn.Linear(3, 3).state_dict().items()}
    loaded = shardsave.load(tmp_path)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert shardsave.inspect(tmp_path).frozen == {"layers.1.weight", "layers.1.bias"}
    values = _load_state_dict_from_keys({"loader.0", "loader.1", "loader.2"}, storage_reader=StorageReader(tmp_path))
    assert values == {f"loader.{rank}": rank for rank in range(3)}


def save_on_a_part(rank: int, folder: Path) -> None:
    """The model is on a mesh of two ranks; all four save, and the others have only a value."""
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 2])
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.arange(16.0).reshape(4, 4))
    state: dict[str, Any] = {f"seen.{rank}": rank}
    if rank in (0, 2):
        state["net"] = {"weight": distribute_tensor(model.weight.detach(), mesh, [Shard(0)])}
    dcp.save(state, storage_writer=StorageWriter(folder, model, durable=False))


def test_ranks_without_weights(tmp_path: Path) -> None:
    """Catches a rank that is refused because another one has its model, and values of ranks that are lost."""
    run_ranks(4, save_on_a_part, tmp_path)
    assert torch.equal(shardsave.load(tmp_path)["weight"], torch.arange(16.0).reshape(4, 4))
    values = _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path))
    assert [values[f"seen.{rank}"] for rank in range(4)] == [0, 1, 2, 3] and values["net"].keys() == {"weight"}


def save_in_two_groups(rank: int, folder: Path) -> list[str]:
    """What this rank is told when its group saves; the second group saves after the first one."""
    both = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    told = []
    for turn, group in enumerate(both):
        if rank // 2 == turn:
            writer = StorageWriter(folder, durable=False, process_group=group)
            try:
                dcp.save({f"layer.{rank}": torch.ones(4)}, storage_writer=writer, process_group=group)
            except dcp.api.CheckpointException as error:
                told += [str(failure) for failure, _ in error.failures.values()]
        dist.barrier()
    return told


def test_groups_that_save_into_one_directory(tmp_path: Path) -> None:
    """Catches a group that replaces in silence what another one has just saved."""
    *first, one, other = run_ranks(4, save_in_two_groups, tmp_path)
    assert first == [[], []] and one == other and len(one) == 2, (first, one, other)
    assert all("ranks 0, 1 have just saved there and ranks 2, 3 were about to replace that" in words for words in one)
    assert set(shardsave.load(tmp_path)) == {"layer.0", "layer.1"}


def save_in_a_process(rank: int, folder: Path) -> None:
    model = rows(Model())
    state = {"model": model.state_dict(), "step": 3}
    kind = AsyncCheckpointerType.PROCESS
    writer = StorageWriter(folder, model, max_shard_size=500)
    future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind)
    model.requires_grad_(True)
    future.result()


@pytest.mark.slow
def test_saves_in_other_processes(tmp_path: Path) -> None:
    """Catches a writer that cannot be sent to another process, and one that there has forgotten the flags of its model."""
    run_ranks(2, save_in_a_process, tmp_path)
    fresh = Model(seed=1).requires_grad_(True)
    shardsave.load_model(fresh, tmp_path)
    assert all(same_bits(value, Model().state_dict()[key]) for key, value in fresh.state_dict().items())
    assert fresh.embed.weight.requires_grad and not fresh.up.weight.requires_grad
