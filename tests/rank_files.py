"""Files of several ranks, written by torch's own HuggingFaceStorageWriter in one process: fast, and the same bytes as with many."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

#: The index at which a chunk begins, and the index at which it ends.
Cut = tuple[Sequence[int], Sequence[int]]


class _Planner(DefaultSavePlanner):
    """Takes the values of chunks from whole tensors."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        chunk = item.tensor_data.chunk
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes))
        return self.state[item.index.fqn][box].contiguous()


def cut(tensor: torch.Tensor, *dims: int) -> list[Cut]:
    """Halves ``tensor`` along each of ``dims``, the first half being the longer one; as DTensor does on two ranks for each."""
    cuts: list[Cut] = [([0] * tensor.dim(), list(tensor.shape))]
    for dim in dims:
        middle = -(-tensor.shape[dim] // 2)
        low = [(begin, [*end[:dim], middle, *end[dim + 1 :]]) for begin, end in cuts]
        high = [([*begin[:dim], middle, *begin[dim + 1 :]], end) for begin, end in cuts]
        cuts = [chunk for pair in zip(low, high) for chunk in pair]
    return cuts


def save_ranks(
    folder: Path, state: Mapping[str, torch.Tensor], cuts: Mapping[str, list[Cut]], files: dict[str, int] | None = None
) -> list[Path]:
    """Writes ``state`` as several ranks would: rank n has the n-th chunk of each tensor. ``files``: name → number of its file."""
    folder.mkdir()
    plans = [
        SavePlan([_item(name, state[name], chunks[rank]) for name, chunks in cuts.items() if rank < len(chunks)])
        for rank in range(max(map(len, cuts.values())))
    ]
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    writer.set_up_storage_writer(True)
    for plan in writer.prepare_global_plan(plans):
        writer.write_data(plan, _Planner(state)).wait()
    return sorted(folder.iterdir())


def _item(name: str, tensor: torch.Tensor, chunk: Cut) -> WriteItem:
    begin, end = chunk
    sizes = torch.Size([b - a for a, b in zip(begin, end)])
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size(begin), sizes), TensorProperties.create_from_tensor(tensor), tensor.size()
    )
    return WriteItem(MetadataIndex(name, torch.Size(begin)), WriteItemType.SHARD, tensor_data=data)
