"""What ranks keep from one save to the next: whatever has changed in between is in the files of the next one."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardsave
from jobs import run_ranks
from shardsave._ranks import agree, save_job
from shardsave._saving.packings import Packings

RANKS = 2


class Layer(nn.Module):
    """Three Parameters that are sharded by rows, and a buffer."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        for number, name in enumerate("abc"):
            self.register_parameter(name, self.sharded(torch.arange(32.0).view(4, 8) + number))
        self.register_buffer("steps", torch.arange(3))

    def sharded(self, whole: torch.Tensor, *, dim: int = 0, trainable: bool = True) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(whole, self.mesh, [Shard(dim)]), trainable)


def local(parameter: nn.Parameter) -> torch.Tensor:
    tensor: Any = parameter
    return tensor.data.to_local()  # type: ignore[no-any-return]


def other_values(layer: Layer) -> None:
    local(layer.a).fill_(7)


def other_memory(layer: Layer) -> None:
    tensor: Any = layer.a
    tensor._local_tensor.data = torch.full_like(tensor._local_tensor, 8)


def other_strides(layer: Layer) -> None:
    tensor: Any = layer.a
    tensor._local_tensor.data = tensor._local_tensor.detach().t().contiguous().t().flip(0)


def other_local_tensor(layer: Layer) -> None:
    tensor: Any = layer.a
    tensor._local_tensor = torch.full_like(tensor._local_tensor, 9)


def frozen(layer: Layer) -> None:
    layer.b.requires_grad_(False)


def another_is_frozen(layer: Layer) -> None:
    layer.a.requires_grad_(False)
    layer.b.requires_grad_(True)


def new_sub_module(layer: Layer) -> None:
    layer.more = Layer(layer.mesh)


def one_less(layer: Layer) -> None:
    del layer.b


def another_name(layer: Layer) -> None:
    layer.z = layer.c
    del layer.c


def another_order(layer: Layer) -> None:
    first = layer.a
    del layer.a
    layer.a = first


def another_shape(layer: Layer) -> None:
    layer.a = layer.sharded(torch.arange(32.0).view(8, 4))


def another_dtype(layer: Layer) -> None:
    layer.a = layer.sharded(torch.arange(32.0).view(4, 8).bfloat16())


def columns(layer: Layer) -> None:
    layer.a = layer.sharded(torch.arange(32.0).view(4, 8) + 5, dim=1)


def replicas(layer: Layer) -> None:
    layer.a = nn.Parameter(distribute_tensor(torch.arange(32.0).view(4, 8) + 6, layer.mesh, [Replicate()]))


def not_sharded(layer: Layer) -> None:
    layer.a = nn.Parameter(torch.arange(32.0).view(4, 8) + 7)


def other_mesh(layer: Layer) -> None:
    """The same rows on the other rank."""
    mesh = DeviceMesh("cpu", [*reversed(range(RANKS))])
    layer.a = nn.Parameter(distribute_tensor(torch.arange(32.0).view(4, 8) + 8, mesh, [Shard(0)]))


def other_values_and_mesh(layer: Layer) -> None:
    mesh = init_device_mesh("cpu", (1, RANKS))
    layer.a = nn.Parameter(distribute_tensor(torch.arange(32.0).view(4, 8) + 9, mesh, [Replicate(), Shard(1)]))


def fewer_rows_than_ranks(layer: Layer) -> None:
    layer.a = layer.sharded(torch.arange(8.0).view(1, 8))


def tied(layer: Layer) -> None:
    layer.b = layer.a


def tied_without_elements_on_a_rank(layer: Layer) -> None:
    layer.a = layer.b = layer.sharded(torch.arange(8.0).view(1, 8))


def no_parameter(layer: Layer) -> None:
    del layer.a
    layer.register_buffer("a", distribute_tensor(torch.arange(32.0).view(4, 8) + 9, layer.mesh, [Shard(0)]))


def sharded_by_fsdp(layer: Layer) -> None:
    """Two layers that were in use: one has its whole parameters in place, the other the sharded ones."""
    layer.open, layer.closed = nn.Linear(8, 8), nn.Linear(8, 8)
    with torch.no_grad():
        for parameter in (*layer.open.parameters(), *layer.closed.parameters()):
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter))
    fully_shard(layer.open, mesh=layer.mesh, reshard_after_forward=False)
    fully_shard(layer.closed, mesh=layer.mesh, reshard_after_forward=True)
    layer.closed(layer.open(torch.ones(2, 8)))


def another_buffer(layer: Layer) -> None:
    layer.steps = torch.arange(4)


def no_buffer(layer: Layer) -> None:
    layer.register_buffer("steps", layer.steps, persistent=False)


CHANGES: dict[str, Callable[[Layer], None]] = {
    change.__name__: change
    for change in (
        other_values, other_memory, other_strides, other_local_tensor, frozen, another_is_frozen, new_sub_module, one_less,
        another_name, another_order, another_shape, another_dtype, columns, replicas, not_sharded, other_mesh, other_values_and_mesh,
        fewer_rows_than_ranks, tied, tied_without_elements_on_a_rank, no_parameter, another_buffer, no_buffer, sharded_by_fsdp,
    )
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "max_shard_size": {"max_shard_size": "128B"},
    "metadata": {"metadata": {"epoch": 2}},
    "only": {"only": "trainable"},
    "dtype": {"dtype": "bfloat16"},
}


def forget() -> None:
    """What a process that saves for the first time knows: nothing."""
    agree._remembered.clear()
    agree._said.clear()
    save_job.SaveJob.packings = Packings()


def save_changed(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in (*CHANGES, *OPTIONS):
        layer, options = Layer(mesh), OPTIONS.get(name, {})
        layer.b.requires_grad_(name != "another_is_frozen")
        shardsave.save(layer, folder / name / "before")
        if name in CHANGES:
            CHANGES[name](layer)
        shardsave.save(layer, folder / name / "after", **options)
        forget()
        shardsave.save(layer, folder / name / "anew", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saves")
    run_ranks(RANKS, save_changed, folder)
    return folder


@pytest.mark.parametrize("name", [*CHANGES, *OPTIONS])
def test_a_change_is_seen(folder: Path, name: str) -> None:
    """Catches something that a save keeps from the one before although it has changed."""
    before, after, anew = (files(folder / name / which) for which in ("before", "after", "anew"))
    assert [file.name for file in after] == [file.name for file in anew]
    assert all(filecmp.cmp(one, other, shallow=False) for one, other in zip(after, anew))
    assert [file.read_bytes() for file in before] != [file.read_bytes() for file in after]
    shardsave.verify(folder / name / "after")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def count_packings(rank: int, folder: Path) -> list[int]:
    """How often the tensors were packed, and the state was joined, after each of three saves."""
    layer = Layer(init_device_mesh("cpu", (RANKS,)))
    forget()
    kept = []
    for number in range(3):
        shardsave.save(layer, folder / str(number))
        kept.append((id(save_job.SaveJob.packings._last), id(agree._said["tensors"]), id(agree._remembered["tensors"])))
    return [len({*column}) for column in zip(*kept)]


def test_what_has_not_changed(tmp_path: Path) -> None:
    """Catches names of very many tensors that are packed, encoded and joined again although they are the same."""
    assert run_ranks(RANKS, count_packings, tmp_path) == [[1, 1, 1]] * RANKS
