"""Distributed tensors as single processes see them: which are read, which are refused, and which calls are collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from jobs import run_ranks
from ranks.sessions import GroupSession
from ranks.test_agree import Net, assembled, global_state, rows
from shardsave._api.process_group import collective_group, members
from shardsave._ranks.agree import agree
from shardsave._ranks.replicas import check_replicas
from shardsave._state.distributed_tensors import PartReader
from shardsave._state.module import State, read_state
from shardsave.errors import UnsupportedTensorError


class OtherTensor(torch.Tensor):
    """As a library that quantises or pads has it."""


class RaggedShard(Shard):
    """A placement that is not torch's."""


def distributed(local: torch.Tensor, placement: Any) -> DTensor:
    return DTensor.from_local(local, init_device_mesh("cpu", (dist.get_world_size(),)), [placement], run_check=False)


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(UnsupportedTensorError) as error:
        yield
    assert message in str(error.value), str(error.value)


def refusals(rank: int) -> None:
    with refused(
        "cannot save 'w': a tensor of which each rank has a part or a copy was expected, it is Partial(sum): the ranks have"
    ):
        global_state({"w": distributed(torch.ones(2), Partial())})
    with refused("cannot save 'w': placements Shard or Replicate were expected, one is "):
        global_state({"w": distributed(torch.ones(2, 2), RaggedShard(0))})
    with refused(
        "cannot save 'w': a DTensor of plain tensors was expected, its local tensor is an OtherTensor; nothing was written"
    ):
        global_state({"w": distributed(torch.ones(2).as_subclass(OtherTensor), Shard(0))})
    with refused("cannot save 'w': a local tensor as (Shard(dim=0),) says was expected, shape "):
        wrong = distributed(torch.ones(4, 2), Shard(0))
        wrong._local_tensor = torch.ones(3, 2)
        global_state({"w": wrong})
    with refused("cannot save 'w': an array in the byte order of this processor was expected by several ranks"):
        global_state({"w": np.ones(2, dtype=">f4")})
    with refused(
        "a plain tensor was expected, it is a DTensor, which all of its processes save together: init_process_group must"
    ):
        read_state({"w": distributed(torch.ones(2), Shard(0))})


def test_refusals() -> None:
    """Catches sums that are saved as if they were values, and parts whose place in the whole is not known."""
    run_ranks(2, refusals, seconds=60)


def read_both_ways(rank: int) -> None:
    mesh, whole = init_device_mesh("cpu", (2,)), torch.arange(24.0).reshape(6, 4)
    placed = [
        distribute_tensor(tensor, mesh, [placement])
        for tensor in (whole, whole.bfloat16(), whole[:1], whole[0], whole[:, :0], whole.t())
        for placement in (Shard(0), Shard(-1), Replicate())
    ]
    tensors = [*placed, *map(nn.Parameter, placed), distribute_tensor(whole[0, 0], mesh, [Replicate()])]
    reader = PartReader([0, 1], rank)
    columns = reader.read_all(tensors)
    assert columns is not None
    for tensor, data, spread in zip(tensors, *columns):
        part = reader.read(tensor)
        assert (data.data_ptr(), data.shape) == (part.local.data_ptr(), part.local.shape)
        assert (spread.dtype, spread.layout) == (part.spread.dtype, part.spread.layout)
        boxes, wanted = ([(c.begin, c.tensor.data_ptr(), c.tensor.stride()) for c in s.local] for s in (spread, part.spread))
        assert boxes == wanted
    wrong = distributed(torch.ones(4, 2), Shard(0))
    wrong._local_tensor = torch.ones(3, 2)
    listing = distributed(torch.ones(4, 2), Shard(0))
    listing._local_tensor.__create_chunk_list__ = list  # type: ignore[attr-defined]
    other = distributed(torch.ones(2).as_subclass(OtherTensor), Shard(0))
    for tensor in (wrong, listing, other, distributed(torch.ones(2), Partial()), torch.ones(2)):
        assert reader.read_all([*tensors, tensor]) is None


def test_all_at_once() -> None:
    """Catches tensors of which something else is read together than one by one, or that are read though one by one they are refused."""
    run_ranks(2, read_both_ways, seconds=60)


def other_group(rank: int) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    mesh = init_device_mesh("cpu", (4,))
    tensors = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "n": torch.ones(2)}
    pair = dist.new_group([2, 0])  # torch sorts the ranks of a group
    if rank not in (0, 2):
        with pytest.raises(ValueError, match="process_group must have this process in it, this process is not in the group"):
            collective_group(tensors, pair)  # type: ignore[arg-type]
        return
    assert collective_group(tensors, pair) is pair and members(pair) == [0, 2]
    session = PairSession(pair)
    parts = PartReader(members(pair), session.rank)
    with refused(
        "'w': all of its 12 elements were expected on the 2 ranks of the group, 8 are there; pass a process_group that has"
    ):
        agree(session, read_state(tensors, reader=parts))
    halves = distribute_halves(whole, rank)
    state = agree(session, read_state({"w": halves}, reader=parts))
    boxes = [state.entries[0].source.layout.boxes(position) for position in range(2)]  # type: ignore[attr-defined]
    assert boxes == [(((0, 0), (3, 2)),), (((3, 0), (3, 2)),)]


def distribute_halves(whole: torch.Tensor, rank: int) -> DTensor:
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 2])
    return DTensor.from_local(whole[:3] if rank == 0 else whole[3:], mesh, [Shard(0)], run_check=False)


class PairSession(GroupSession):
    """Over a group of two."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.rank, self.size, self.hosts, self._group = dist.get_rank(group), 2, [0, 0], group

    def exchange(self, what: str, mine: bytes) -> list[bytes]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, mine, group=self._group)
        return values


def test_a_group_smaller_than_the_world() -> None:
    """Catches positions in the group that pass for global ranks, and elements that are outside of the group."""
    run_ranks(4, other_group, seconds=60)


def remembered_by_some(rank: int) -> None:
    pair = dist.new_group([0, 2])
    session = GroupSession()
    names = []
    for _ in range(2):
        state = agree(session, read_state({f"stage{rank}": torch.ones(2)}))
        names.append([entry.name for entry in state.entries])
        if rank in (0, 2):
            agree(PairSession(pair), read_state({f"other{rank}": torch.ones(2)}))
    assert names == [[f"stage{n}" for n in range(4)]] * 2


def test_what_only_some_ranks_remember() -> None:
    """Catches ranks that skip the descriptions for which others wait."""
    run_ranks(4, remembered_by_some, seconds=60)


def collective(rank: int) -> None:
    world = dist.group.WORLD
    alone = dist.new_group([rank], use_local_synchronization=True)
    plain, sharded = Net(), Net()
    rows(sharded)
    assert collective_group(plain, None) is None and collective_group(plain, alone) is None
    assert collective_group(plain, world) is world
    assert collective_group(sharded, None) is world and collective_group(sharded.state_dict(), None) is world
    assert collective_group(sharded.parameters(), None) is world and collective_group(nn.Sequential(sharded), None) is world
    assert collective_group(None, None) is None and collective_group([], world) is world
    assert collective_group({"step": 1, "w": torch.ones(1)}, None) is None
    for wrong in ("world", 3):
        with pytest.raises(TypeError, match="process_group must be a group of torch.distributed or None, not "):
            collective_group(plain, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="or None, not DeviceMesh; pass mesh.get_group\\(\\)"):
        collective_group(plain, init_device_mesh("cpu", (2,)))  # type: ignore[arg-type]
    flags = {entry.name: entry.frozen for entry in global_state(sharded.state_dict(keep_vars=True)).entries}
    assert flags["frozen.weight"] is True and flags["a.weight"] is False and flags["steps"] is None
    plain_state = global_state(sharded.state_dict())  # as users pass it: flags are lost, in one process too
    assert not plain_state.flags_known and {entry.kind for entry in plain_state.entries} == {"tensor"}


def test_which_calls_are_collective() -> None:
    """Catches a sharded model that one process saves alone, a whole one that all must save, and flags of a mapping that are lost."""
    run_ranks(2, collective, seconds=60)


def megatron(rank: int) -> None:
    """Rows are cut anywhere, as Megatron-FSDP does: each rank has a run of elements, and says itself which boxes these are."""
    whole = torch.arange(30.0).reshape(6, 5)
    boxes = [[((0, 0), (2, 5)), ((2, 0), (1, 3))], [((2, 3), (1, 2)), ((3, 0), (3, 5))], []][rank]
    local = torch.cat(
        [
            torch.empty(0),
            *(whole[box[0][0] : box[0][0] + box[1][0], box[0][1] : box[0][1] + box[1][1]].flatten() for box in boxes),
        ]
    )
    chunks = [ChunkStorageMetadata(torch.Size(begin), torch.Size(sizes)) for begin, sizes in boxes]
    mesh = init_device_mesh("cpu", (3,))
    tensor = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    tensor = nn.Parameter(tensor)  # type: ignore[assignment]
    tensor._local_tensor.__create_chunk_list__ = lambda: chunks  # type: ignore[attr-defined]
    state = global_state({"w": tensor, "n": torch.ones(1)})
    assert state.entries[0].frozen is False and torch.equal(assembled(state.entries[0].source), whole)  # type: ignore[arg-type]
    tensor._local_tensor.__create_chunk_list__ = lambda: chunks * 2  # type: ignore[attr-defined]
    if boxes:
        with refused("'w': a local tensor of "):
            read_state({"w": tensor}, reader=PartReader(range(3), rank))


def test_tensors_that_list_their_boxes() -> None:
    """Catches boxes that are taken from the placements although the tensor says itself that they are others."""
    run_ranks(3, megatron, seconds=60)


def drifted(rank: int) -> tuple[str, State]:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(1)
        model[1].running_mean += rank  # type: ignore[operator]
    mesh = init_device_mesh("cpu", (2, 2))
    model[0].weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)]))
    if rank == 3:
        model[0].weight._local_tensor[0, 0] = 7
    session = GroupSession()
    state = agree(session, read_state(model, reader=PartReader(range(4), rank)))
    with pytest.raises(UnsupportedTensorError) as error:
        check_replicas(session, state, "raise")
    _, notes, _ = check_replicas(session, state, "lowest_rank")
    return str(error.value), notes


def test_replicas_that_drifted() -> None:
    """Catches running statistics of one rank that are saved as those of all, and a replica of a mesh that differs."""
    values = run_ranks(4, drifted, seconds=60)
    assert len(set(values)) == 1
    message, (note,) = values[0]
    expected = (
        "'0.weight' and 1 other tensor: the same values on all ranks that hold them were expected, rank 3 and rank 1 differ"
    )
    assert message.startswith(f"cannot save {expected}; on_divergence=") and note.endswith(expected)
