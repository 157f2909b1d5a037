"""Jobs whose process group moves tensors of accelerators alone, as those of NCCL do. Method: a group that knows of no CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import shardsave
from jobs import run_ranks
from shardsave._ranks import group as groups

SIZE = 4
WHOLE = torch.arange(64 * 8, dtype=torch.float32).view(64, 8)


def sharded(rank: int) -> nn.ParameterDict:
    """`WHOLE` twice, by rows and by columns."""
    mesh = DeviceMesh("cpu", list(range(SIZE)), _init_backend=False)
    parts = {
        dim: DTensor.from_local(
            WHOLE.tensor_split(SIZE, dim)[rank].contiguous(),
            mesh,
            [Shard(dim)],
            run_check=False,
            shape=WHOLE.shape,
            stride=WHOLE.stride(),
        )
        for dim in (0, 1)
    }
    return nn.ParameterDict({"rows": nn.Parameter(parts[0]), "columns": nn.Parameter(parts[1])})


def parts_of(model: nn.Module) -> list[Any]:
    return [parameter.detach().to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]


def save_and_load(rank: int, folder: Path, several_hosts: bool) -> None:
    import torch.testing._internal.distributed.fake_pg

    store = dist.PrefixStore("accelerators", groups.job_store().clone())  # type: ignore[arg-type]
    dist.destroy_process_group()
    dist.init_process_group("cuda:fake", store=store, rank=rank, world_size=SIZE)
    with pytest.raises(RuntimeError, match="cpu"):
        dist.all_reduce(torch.zeros(1))
    if several_hosts:
        machine = groups.this_host()
        groups.this_host = lambda: machine._replace(key=f"host {rank}")  # type: ignore[assignment]
    model = sharded(rank)
    wanted = [part.clone() for part in parts_of(model)]
    shardsave.save(model, folder / "ranks", training={"sums": torch.ones(2)}, rng=True)
    shardsave.save_async(model, folder / "background").wait()
    for part in parts_of(model):
        part.zero_()
    shardsave.load_model(model, folder / "ranks")
    assert all(map(torch.equal, parts_of(model), wanted))
    shardsave.resume(folder / "ranks", model, training={"sums": torch.zeros(2)}, rng=True)
    shardsave.verify(folder / "ranks", process_group=dist.group.WORLD)


@pytest.mark.parametrize("several_hosts", [False, True], ids=["one host", "several hosts"])
def test_the_group_of_the_training_is_not_used(tmp_path: Path, several_hosts: bool) -> None:
    """Catches a collective call over the training's own group, and a group of ours that takes its backend from it."""
    run_ranks(SIZE, save_and_load, tmp_path, several_hosts)
    for name in ("ranks", "background"):
        loaded = shardsave.load(tmp_path / name)
        assert torch.equal(loaded["rows"], WHOLE) and torch.equal(loaded["columns"], WHOLE)
