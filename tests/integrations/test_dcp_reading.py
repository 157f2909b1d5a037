"""Boxes of stored tensors, read without the rest, and documents that come from anywhere."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import shardsave
from rank_files import cut, save_ranks
from shardsave.integrations._dcp_read import open_stored, read_items
from shardsave.integrations.dcp import StorageReader, StorageWriter
from support import same_bits
from training_state import edit_training, training_directory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")

Box = tuple[slice, ...]


class Boxes:
    """A planner for boxes: item n is read into tensor n."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.committed: list[int] = []

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.tensors[item.dest_index.index or 0]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed.append(item.dest_index.index or 0)


def item(number: int, name: str, begin: list[int], box: list[tuple[int, int]]) -> ReadItem:
    """A box (begin, size in each dimension) of the chunk of ``name`` that begins at ``begin``."""
    offsets, lengths = torch.Size(at for at, _ in box), torch.Size(size for _, size in box)
    zeros = torch.Size([0] * len(box))
    return ReadItem(
        LoadItemType.TENSOR, MetadataIndex(name, zeros, number), zeros, MetadataIndex(name, begin), offsets, lengths
    )


def random_box(generator: random.Random, shape: torch.Size) -> list[tuple[int, int]]:
    return [(at := generator.randint(0, size), generator.randint(0, size - at)) for size in shape]


@pytest.mark.parametrize("seed", range(4))
def test_any_box(seed: int, tmp_path: Path) -> None:
    """Catches an element of a box that comes from another place, for any shape, dtype, box and strides of the destination."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
    state = {}
    for number in range(12):
        shape = [generator.choice([1, 2, 3, 5, 700]) for _ in range(generator.randint(0, 3))]
        dtype = generator.choice(dtypes)
        values = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
        state[f"t{number}"] = values.view(dtype).reshape(shape)
    shardsave.save(state, tmp_path, max_shard_size=10_000, durable=False)
    stored = open_stored(str(tmp_path), None)
    items, tensors, expected = [], [], []
    for name, whole in state.items():
        for _ in range(4):
            box = random_box(generator, whole.shape)
            part = whole[tuple(slice(at, at + size) for at, size in box)]
            items.append(item(len(items), name, [0] * whole.dim(), box))
            expected.append(part)
            into = torch.zeros_like(part.contiguous().view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part)
            into = into.view(part.dtype)
            tensors.append(into.mT.contiguous().mT if into.dim() > 1 and generator.random() < 0.5 else into)
    planner = Boxes(tensors)
    report = read_items(stored, LoadPlan(items), planner, verify=True, progress=False)  # type: ignore[arg-type]
    assert all(map(same_bits, tensors, expected)) and sorted(planner.committed) == [*range(len(items))]
    assert report.verified is None and report.bytes < 4 * sum(tensor.nbytes for tensor in state.values())


def test_rows_are_read_alone(tmp_path: Path) -> None:
    """Catches bytes that are read although no box needs them; a tensor that is read whole is verified."""
    shardsave.save({"w": torch.randn(1000, 100)}, tmp_path, durable=False)
    for box, nbytes, verified in (([(500, 10), (0, 100)], 4000, None), ([(0, 1000), (0, 100)], 400_000, True)):
        planner = Boxes([torch.zeros([size for _, size in box])])
        stored = open_stored(str(tmp_path), None)
        report = read_items(stored, LoadPlan([item(0, "w", [0, 0], box)]), planner, verify=True, progress=False)  # type: ignore[arg-type]
        assert (report.bytes, report.verified) == (nbytes, verified)


def test_files_of_ranks(tmp_path: Path) -> None:
    """Catches chunks of torch's own files of ranks that are joined at the wrong place."""
    state = {"a": torch.randn(5, 7), "b": torch.arange(9)}
    save_ranks(tmp_path / "ranks", state, {name: cut(tensor, 0) for name, tensor in state.items()})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with pytest.warns(UserWarning, match="whole shapes are not recorded"):
        dcp.load(loaded, storage_reader=StorageReader(tmp_path / "ranks"), no_dist=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


STATE = {
    "model": {"w": torch.arange(6.0)},
    "rest": {"t": torch.ones(2), "list": [1, (2.5, "x")], "stream": io.BytesIO(b"abc"), "pair": (torch.arange(2), None)},
}
KEY = "torch.distributed.checkpoint"
WRONG: list[Any] = [
    None, True, -1, 1.5, "x", "", [], {}, {"tensor": "none"}, {"tensor": 3}, {"tensor": "tensors/rest.t"}, {"list": []}, {"dict": {}},
    {"pairs": []}, {"pairs": [[{"tuple": []}, 1]]}, {"pairs": [[{"tuple": [-1]}, 1]]}, {"tuple": ["model", "w"]}, {"list": [[1]]},
    {"list": [{"list": ["model", "w"]}]}, {"optimizer": {}}, {"per_rank": "x"}, {"bytes": "%"}, {"dict": {"w": {"list": []}}},
]  # fmt: skip


def save_state(folder: Path) -> Any:
    """Saves `STATE`; returns the document's own part of it."""
    dcp.save(STATE, storage_writer=StorageWriter(folder, prefix="model.", durable=False), no_dist=True)
    return json.loads((training_directory(folder) / "index.json").read_bytes())["shared"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copied = document.copy()
    copied[path[0]] = changed(document[path[0]], path[1:], value)
    return copied


def test_one_wrong_value_anywhere(tmp_path: Path) -> None:
    """Catches another exception than ours, and a document of DCP's names that is believed where it is wrong."""
    whole = save_state(tmp_path)
    generator = random.Random(0)
    refused = accepted = 0
    for path in places(whole):
        for wrong in generator.sample(WRONG, 2):
            edit_training(tmp_path, lambda document: document.update(shared=changed(whole, path, wrong)))
            try:
                with open_stored(str(tmp_path), None).checkpoint:
                    pass
                dcp.state_dict_loader._load_state_dict_from_keys(storage_reader=StorageReader(tmp_path))
            except shardsave.ShardSaveError as error:
                refused += 1
                assert len(str(error)) < 1000, (path, wrong)
            except CheckpointException as error:
                ((cause, _),) = error.failures.values()
                refused += 1
                assert isinstance(cause, shardsave.ShardSaveError), (path, wrong, cause)
            else:
                accepted += 1
    assert refused > 50 and accepted > 5


def test_one_name_twice(tmp_path: Path) -> None:
    """Catches two values of one name, of which one would hide the other."""
    whole = save_state(tmp_path)
    pairs = whole["dict"][KEY]["dict"]["values"]["pairs"]
    pairs.append([{"tuple": ["model", "w"]}, 3])
    edit_training(tmp_path, lambda document: document.update(shared=whole))
    with pytest.raises(shardsave.CorruptCheckpointError, match=r"every name was expected once, 'model.w' is there twice"):
        open_stored(str(tmp_path), None)


def test_a_training_state_that_dcp_did_not_save(tmp_path: Path) -> None:
    """Catches a resume from a state dict as if it were a training state, and the other way round."""
    save_state(tmp_path / "dcp")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="nothing was changed"):
        shardsave.resume(tmp_path / "dcp", training={"step": 1})
    shardsave.save({"w": torch.ones(2)}, tmp_path / "own", training={KEY: {"step": 1}})
    with pytest.raises(shardsave.CorruptCheckpointError):
        open_stored(str(tmp_path / "own"), None)
    shardsave.save({"w": torch.ones(2)}, tmp_path / "own", training={"step": 1})
    state = {"w": torch.zeros(2)}
    dcp.load(state, storage_reader=StorageReader(tmp_path / "own"), no_dist=True)
    assert torch.equal(state["w"], torch.ones(2))
