"""What several ranks agree on: the state that one process with the whole model would have, and where its elements are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from jobs import run_ranks
from ranks.sessions import GroupSession
from shardsave._common.spread import Spread
from shardsave._ranks.agree import agree
from shardsave._state.distributed_tensors import PartReader
from shardsave._state.module import State, read_state


class Net(nn.Module):
    """Uneven sizes, a frozen layer, tied weights, also of fewer rows than ranks, two dtypes, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 10)
        self.b = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 1).requires_grad_(False)
        self.narrow = nn.Linear(6, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gate = nn.Linear(6, 1, bias=False)
        self.other_gate = nn.Linear(6, 1, bias=False)
        self.other_gate.weight = self.gate.weight
        self.register_buffer("steps", torch.arange(5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.b(self.a(self.embed(tokens)))))


def rows(model: nn.Module) -> None:
    fully_shard(model.a)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def columns(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 4 == 0 else Shard(0))


def used(model: nn.Module) -> None:
    """After a forward pass, some modules have their whole parameters, and torch's hooks for state dicts are there."""
    fully_shard(model.narrow)
    fully_shard(model.a, reshard_after_forward=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=False)
    model(torch.arange(3))


def offloaded(model: nn.Module) -> None:
    fully_shard(
        model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), offload_policy=CPUOffloadPolicy(pin_memory=False)
    )


def hybrid(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def tensor_parallel(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"a": ColwiseParallel(), "b": RowwiseParallel(), "norm": SequenceParallel()}
    parallelize_module(model, mesh, plan)


def both(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])


def sub_meshes(model: nn.Module) -> None:
    """Each half of the ranks has a mesh of its own, with the whole model on it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})


def strided(model: nn.Module) -> None:
    """As transformers shards fused projections: several boxes on each rank."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = model.a.weight
    parts = [group.chunk(dist.get_world_size()) for group in weight.detach().chunk(2)]
    local = torch.cat([(*chunks, weight.detach()[:0])[min(dist.get_rank(), len(chunks))] for chunks in parts])
    placed = DTensor.from_local(
        local, mesh, [_StridedShard(0, split_factor=2)], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    model.a.weight = nn.Parameter(placed)


def replicated(model: nn.Module) -> None:
    """As DistributedDataParallel has it: no tensor is distributed."""


SHARDINGS = [rows, columns, used, offloaded, hybrid, tensor_parallel, both, sub_meshes, strided, replicated]


def assembled(spread: Spread) -> torch.Tensor:
    """The whole tensor, joined from the boxes that the layout and the ranks say they have; each element must be there."""
    mine = [(chunk.begin, chunk.tensor.detach().clone()) for chunk in spread.local]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    whole = torch.zeros(spread.shape, dtype=spread.dtype)
    found = torch.zeros(spread.shape, dtype=torch.bool)
    for rank, chunks in enumerate(of_ranks):
        boxes = [(begin, tuple(tensor.shape)) for begin, tensor in chunks]
        assert boxes == list(spread.layout.boxes(rank)), (rank, boxes, spread.layout.boxes(rank))
        for begin, tensor in chunks:
            place = tuple(slice(at, at + size) for at, size in zip(begin, tensor.shape))
            whole[place] = tensor
            found[place] = True
    assert found.all()
    return whole


def summary(state: State) -> list[Any]:
    return [(one.name, one.kind, one.frozen, one.tied_to, one.source.dtype, tuple(one.source.shape)) for one in state.entries]


def global_state(source: Any) -> State:
    session = GroupSession()
    return agree(session, read_state(source, reader=PartReader(range(session.size), session.rank)))


def check_all(rank: int) -> None:
    for sharding in SHARDINGS:
        try:
            shard_and_agree(sharding)
        except Exception as error:
            raise AssertionError(f"{sharding.__name__}: {error!r}") from error


def shard_and_agree(sharding: Callable[[nn.Module], None]) -> None:
    model = Net()
    whole = read_state(Net())
    sharding(model)
    if sharding is tensor_parallel:
        model.head.weight = model.embed.weight  # parallelize_module leaves both alone
    state = global_state(model)
    assert summary(state) == summary(whole) and state._replace(entries=()) == whole._replace(entries=())
    for entry, one in zip(state.entries, whole.entries):
        assert isinstance(entry.source, Spread)
        assert torch.equal(assembled(entry.source), one.tensor), entry.name
    if sharding is hybrid:
        given = next(e.source for e in state.entries if e.name == "a.weight").senders(3, [0, 0, 0, 0])
        assert [sender for sender, _ in given] == [3, 0]
    again = global_state(model)
    assert [e.source.layout for e in again.entries] == [e.source.layout for e in state.entries]


def test_the_state_of_one_process() -> None:
    """Catches a name, flag, tie, dtype or element that several ranks see in another way than one process with the whole model."""
    run_ranks(4, check_all, seconds=60)
