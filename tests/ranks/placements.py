"""Models, and how their tensors are placed on four ranks: in every way that a save must put together again.

Each function of `PLACEMENTS` is called on all ranks, and returns two models with the same values: one that is whole, and one whose tensors
are placed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

Pair = tuple[nn.Module, nn.Module]


class Block(nn.Module):
    """Two projections and a norm, as in a transformer; with a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("seen", torch.arange(width))


class Model(nn.Module):
    """Two blocks between tied embeddings, some of it frozen, in several dtypes."""

    def __init__(self, width: int = 16, names: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(names, width)
        self.blocks = nn.ModuleList([Block(width), Block(width).to(torch.bfloat16)])
        self.head = nn.Linear(width, names, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[0].down.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))


def _model(**sizes: int) -> Pair:
    torch.manual_seed(0)
    whole = Model(**sizes)
    return whole, copy.deepcopy(whole)


def _sharded(whole: nn.Module, placed: nn.Module, **options: Any) -> Pair:
    for block in placed.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)
    fully_shard(placed, **options)
    return whole, placed


def rows() -> Pair:
    return _sharded(*_model())


def columns() -> Pair:
    return _sharded(*_model(), shard_placement_fn=lambda p: Shard(p.dim() - 1))


def rows_and_columns() -> Pair:
    return _sharded(*_model(), shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[0] % 3 == 0 else Shard(0))


def uneven() -> Pair:
    return _sharded(*_model(width=13, names=31))


def fewer_rows_than_ranks() -> Pair:
    return _sharded(*_model(width=3, names=5))


def hybrid() -> Pair:
    return _sharded(*_model(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("twice", "rows")))


def offloaded() -> Pair:
    return _sharded(*_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))


def _in_parallel(placed: nn.Module, mesh: Any) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "norm": SequenceParallel()}
    for block in placed.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, plan)


def tensor_parallel() -> Pair:
    whole, placed = _model()
    _in_parallel(placed, init_device_mesh("cpu", (4,)))
    return whole, placed


def rows_of_tensor_parallel() -> Pair:
    whole, placed = _model()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "tensors"))
    _in_parallel(placed, mesh["tensors"])
    return _sharded(whole, placed, mesh=mesh["rows"])


def fused_and_strided() -> Pair:
    """A fused projection as transformers places it: of each of its two halves, each rank has a part."""
    whole, placed = nn.Linear(6, 16), nn.Linear(6, 16)
    mesh = init_device_mesh("cpu", (4,))
    rank = mesh.get_rank()
    for name, tensor in whole.named_parameters():
        local = torch.cat([half.chunk(4)[rank] for half in tensor.detach().chunk(2)])
        placements = [_StridedShard(0, split_factor=2)]
        spread = DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
        placed.register_parameter(name, nn.Parameter(spread))
    return whole, placed


def replicated_and_sharded() -> Pair:
    """Tensors on a part of a mesh: the same on two ranks each, or on all."""
    whole, placed = nn.Linear(8, 12), nn.Linear(8, 12)
    mesh = init_device_mesh("cpu", (2, 2))
    for (name, tensor), placements in zip(whole.named_parameters(), ([Shard(1), Replicate()], [Replicate(), Replicate()])):
        placed.register_parameter(name, nn.Parameter(distribute_tensor(tensor.detach(), mesh, placements)))
    return whole, placed


def low_rank_adapters() -> Pair:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"])
    whole = peft.get_peft_model(Model(), config)
    return _sharded_adapters(whole, copy.deepcopy(whole))


def _sharded_adapters(whole: nn.Module, placed: nn.Module) -> Pair:
    for block in placed.base_model.model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(placed)
    return whole, placed


def the_same_on_all() -> Pair:
    """Plain tensors, as in data parallel training: a group must be given."""
    return _model()


PLACEMENTS: dict[str, Callable[[], Pair]] = {
    function.__name__: function
    for function in (
        rows, columns, rows_and_columns, uneven, fewer_rows_than_ranks, hybrid, offloaded, tensor_parallel, rows_of_tensor_parallel,
        fused_and_strided, replicated_and_sharded, low_rank_adapters, the_same_on_all,
    )
}  # fmt: skip
