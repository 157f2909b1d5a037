"""A model for jobs of several ranks, and the ways in which it is distributed over them."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Model(nn.Module):
    """Uneven sizes, a frozen layer, tied weights, a buffer, two dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8).to(torch.bfloat16)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(seed, seed + 5))
        self.up.requires_grad_(False)


def rows(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def columns(model: nn.Module) -> nn.Module:
    return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else Shard(0))


def hybrid(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s")))


def tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def replicated(model: nn.Module) -> nn.Module:
    return model


#: Of these, a state dict with an optimizer and other values is saved too.
NESTED = ("columns", "both")

PLACEMENTS = {f.__name__: f for f in (rows, columns, hybrid, tensor_parallel, both, replicated)}


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def training_of(state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer and a program have beside a model: tensors placed as the parameters are, values, a tensor within a value."""
    moments = {
        name: {"exp_avg": tensor * 2, "step": torch.tensor(3.0)} for name, tensor in state.items() if tensor.is_floating_point()
    }
    return {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [*moments]}]}


def same_files(one: Path, many: Path) -> None:
    names = sorted(os.listdir(one))
    assert sorted(os.listdir(many)) == names
    different = [name for name in names if not filecmp.cmp(one / name, many / name, shallow=False)]
    assert not different, different
