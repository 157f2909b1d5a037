"""Modules that are sharded over four ranks in all the ways that torch has, and what they must hold after a load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

RANKS = 4


class Net(nn.Module):
    """Has uneven rows, fewer rows than ranks, tied and frozen parameters, two dtypes, and buffers of both kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(22, 16)
        self.up = nn.Linear(16, 13)
        self.down = nn.Linear(13, 16)
        self.few = nn.Linear(16, 3).to(torch.bfloat16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 22, bias=False)
        self.head.weight = self.embed.weight
        self.up.requires_grad_(False)
        self.register_buffer("steps", torch.arange(seed, seed + 5))
        self.register_buffer("scratch", torch.full((3,), float(seed)), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.embed(tokens))
        hidden = hidden + self.down(self.up(hidden))
        return self.head(hidden).sum() + self.few(hidden.to(torch.bfloat16)).float().sum()


def rows(net: Net, **options: Any) -> None:
    if "mesh" not in options:
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.up, net.down, net.few, net.norm):
        fully_shard(part, **options)
    fully_shard(net, **options)


def columns(net: Net) -> None:
    rows(net, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 and p.shape[1] % RANKS == 0 else Shard(0))


def offloaded(net: Net) -> None:
    rows(net, offload_policy=CPUOffloadPolicy(pin_memory=False))


def hybrid(net: Net) -> None:
    rows(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(net: Net) -> None:
    _parallelize(net, init_device_mesh("cpu", (RANKS,)))


def both(net: Net) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _parallelize(net, mesh["tp"])
    rows(net, mesh=mesh["dp"])


def _parallelize(net: Net, mesh: Any) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "norm": SequenceParallel()}
    parallelize_module(net, mesh, plan)


def strided(net: Net) -> None:
    """A lone `_StridedShard`, as transformers' tensor parallelism has for fused projections: several boxes on a rank."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (RANKS,))
    local = strided_rows(net.down.weight.detach(), dist.get_rank())
    placements = (_StridedShard(0, split_factor=2),)
    spread = DTensor.from_local(local, mesh, placements, run_check=False, shape=(16, 13), stride=(13, 1))
    net.down.weight = nn.Parameter(spread, net.down.weight.requires_grad)


def strided_rows(whole: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows of ``whole`` that ``rank`` has: its part of each half."""
    return torch.cat([half.chunk(RANKS)[rank] for half in whole.chunk(2)])


def replicated(net: Net) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    spread = DTensor.from_local(net.up.weight.detach(), mesh, (Replicate(),))
    net.up.weight = nn.Parameter(spread, net.up.weight.requires_grad)


SHARDINGS: dict[str, Callable[[Net], None]] = {
    "rows": rows, "columns": columns, "CPU offload": offloaded, "hybrid": hybrid, "tensor parallel": tensor_parallel,
    "rows over tensor parallel": both, "strided": strided, "replicated": replicated,
}  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_equal(module: nn.Module, expected: nn.Module, where: str = "") -> None:
    """Raises AssertionError, naming the tensor, unless ``module`` has the values and flags of ``expected``, which is whole."""
    wanted = expected.state_dict(keep_vars=True)
    found = module.state_dict(keep_vars=True)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.requires_grad == wanted[name].requires_grad, (where, name)
        if _is_strided(tensor):  # torch before 2.13 does not put these together rightly
            value, right = tensor.to_local(), strided_rows(wanted[name], dist.get_rank())
        else:
            value, right = whole(tensor.detach()), wanted[name]
        assert value.dtype == right.dtype and torch.equal(value, right), (where, name)


def _is_strided(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor) and [type(placement).__name__ for placement in tensor.placements] == ["_StridedShard"]
