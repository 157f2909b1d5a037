"""Storage for torch.distributed.checkpoint on several ranks of which one fails: nothing is committed, and all are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_models import Model, rows
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import shardsave
from jobs import Job, run_ranks
from shardsave.integrations.dcp import StorageReader, StorageWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


class FailsOn(DefaultSavePlanner):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def resolve_data(self, item: Any) -> Any:
        if dist.get_rank() == self.rank:
            raise MemoryError(f"no memory on {self.rank}")
        return super().resolve_data(item)


def fail_on(rank: int, folder: Path, failing: int) -> list[str]:
    model = rows(Model())
    dcp.save(model.state_dict(), storage_writer=StorageWriter(folder, model, durable=False))
    before = sorted(os.listdir(folder))
    dist.barrier()
    messages = []
    for planner, extra in ((FailsOn(failing), {}), (None, {f"bad{rank}": object()} if rank == failing else {})):
        try:
            dcp.save(model.state_dict() | extra, storage_writer=StorageWriter(folder, model), planner=planner)
        except BaseException as error:
            messages.append(str(error))
    dist.barrier()
    after = sorted(os.listdir(folder))
    dist.barrier()
    dcp.save(model.state_dict(), storage_writer=StorageWriter(folder, model))
    return [*messages, str(after == before)]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_rank_fails(failing: int, tmp_path: Path) -> None:
    """Catches a checkpoint without what one rank could not give, ranks that wait for it, and litter; the next save works."""
    for memory, value, unchanged in run_ranks(4, fail_on, tmp_path, failing):
        assert f"rank {failing}: " in memory and f"no memory on {failing}" in memory and "UnsupportedTrainingError" in value
        assert f"the value 'bad{failing}'" in value and unchanged == "True"
    assert sorted(shardsave.load(tmp_path)) == sorted(Model().state_dict())


class Unreadable(StorageReader):
    """Cannot be opened on one rank, at the first attempt."""

    attempts = 0

    def read_metadata(self) -> Metadata:
        self.attempts += 1
        if dist.get_rank() == 1 and self.attempts == 1:
            raise shardsave.DirectoryBusyError("busy")
        return super().read_metadata()


def read_at_second_attempt(rank: int, folder: Path) -> str:
    state = rows(Model(seed=1)).state_dict()
    try:
        dcp.load(state, storage_reader=Unreadable(folder))
    except BaseException as error:
        return str(error)
    return "loaded"


def test_a_rank_that_cannot_open_the_checkpoint(tmp_path: Path) -> None:
    """Catches a rank that tries again by itself, and then waits for ranks that have given up."""
    shardsave.save(Model(), tmp_path, durable=False)
    assert all("busy" in message for message in run_ranks(2, read_at_second_attempt, tmp_path))


def contradict(rank: int, folder: Path) -> str:
    tensor = torch.zeros(4, dtype=torch.float32 if rank == 0 else torch.float64)
    state = {"a": tensor[:2], "b": tensor[2:]} if rank == 0 else {"a": tensor[2:], "b": tensor[:2]}
    spread = {name: Placed(part, rank) for name, part in state.items()}
    try:
        dcp.save(spread, storage_writer=StorageWriter(folder, durable=False))
    except BaseException as error:
        return str(error)
    return ""


class Placed(torch.Tensor):
    """Half of a vector, as tensors of other libraries tell DCP."""

    @staticmethod
    def __new__(cls, part: torch.Tensor, rank: int) -> Placed:
        made = torch.Tensor._make_subclass(cls, part)
        made.rank = rank  # type: ignore[attr-defined]
        return made

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        chunk = ChunkStorageMetadata(torch.Size([2 * self.rank]), torch.Size([2]))  # type: ignore[attr-defined]
        data = TensorWriteData(chunk, TensorProperties(self.dtype), torch.Size([4]))
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_ranks_that_contradict_each_other(tmp_path: Path) -> None:
    """Catches parts of two dtypes that become one tensor; the message names tensor and ranks."""
    for message in run_ranks(2, contradict, tmp_path / "c"):
        assert "cannot save 'a': one dtype, shape and flag was expected on all ranks" in message
        assert "rank 0 has" in message and "rank 1 has" in message
    assert not list(tmp_path.rglob("*.safetensors"))


def die(rank: int, folder: Path) -> str:
    model = rows(Model())
    dcp.save(model.state_dict(), storage_writer=StorageWriter(folder, model))
    writer = StorageWriter(folder, model, rank_timeout=5.0)
    try:
        dcp.save(model.state_dict(), storage_writer=writer, planner=DiesOn(1))
    except BaseException as error:
        return str(error)
    return "saved"


class DiesOn(FailsOn):
    def resolve_data(self, item: Any) -> Any:
        if dist.get_rank() == self.rank:
            os._exit(3)
        return super().resolve_data(item)


def test_a_rank_that_dies(tmp_path: Path) -> None:
    """Catches ranks that wait for a dead one, and a checkpoint without its part."""
    with Job(3, die, tmp_path) as job:
        ends = job.ended()
    assert ends[1].exit_code == 3 and all(ends[rank].value not in (None, "saved") for rank in (0, 2)), ends
    assert sorted(shardsave.load(tmp_path)) == sorted(Model().state_dict())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".shardsave-")]


def alone(rank: int, folder: Path) -> str:
    model = rows(Model())
    if rank == 0:
        try:
            dcp.save(model.state_dict(), storage_writer=StorageWriter(folder, model), no_dist=True)
        except BaseException as error:
            return str(error)
    return ""


def test_a_part_alone(tmp_path: Path) -> None:
    """Catches one rank's part that is saved as if it were everything."""
    message = run_ranks(2, alone, tmp_path / "c")[0]
    assert "all elements of its shape" in message and "without no_dist=True" in message and not (tmp_path / "c").exists()
