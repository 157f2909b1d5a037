"""Storage for torch.distributed.checkpoint in one process: writes a checkpoint like all others, which comes back as DCP saved it."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import shardsave
from shardsave._format.dtypes import BY_NAME
from shardsave.integrations.dcp import StorageReader, StorageWriter
from support import SmallModel, same_bits, same_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def save(state: dict[str, Any], writer: StorageWriter, **options: Any) -> None:
    dcp.save(state, storage_writer=writer, no_dist=True, **options)


def load(state: dict[str, Any], reader: StorageReader, **options: Any) -> dict[str, Any]:
    dcp.load(state, storage_reader=reader, no_dist=True, **options)
    return state


def failure(error: CheckpointException) -> BaseException:
    """The error that DCP wrapped."""
    ((cause, _),) = error.failures.values()
    return cause


def emptied(value: Any) -> Any:
    """``value`` as a program has it before it loads: the same tensors with other values, other values of the same kind."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Mapping):
        return {key: emptied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [emptied(item) for item in value]
    return None


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and same_bits(left, right)
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, io.BytesIO):
        return isinstance(right, io.BytesIO) and left.getvalue() == right.read()
    return bool(left == right)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained() -> tuple[SmallModel, dict[str, Any]]:
    """A model, and a state dict of it with all that a training keeps beside it."""
    model = SmallModel()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    listed = optimizer.state_dict()
    listed["state"] = {str(number): value for number, value in listed["state"].items()}  # DCP makes text of every key
    state = {
        "model": model.state_dict(),
        "optimizer": listed,
        "step": 7,
        "losses": [0.5, float("nan")][:1],
        "nested": {"list": [torch.arange(3), {"deep": (1, "two", None, 2.5)}], "empty": {}, "dtype": torch.bfloat16},
        "pair": (torch.arange(5), b"raw"),
        "stream": io.BytesIO(b"\x80\x04."),
    }
    return model, state


def test_the_same_bytes_as_a_save(tmp_path: Path) -> None:
    """Catches files of DCP's state dict that differ from those of the model itself: names, order, flags, ties, index."""
    model = SmallModel()
    writer = StorageWriter(tmp_path / "dcp", model, max_shard_size=4000, metadata={"run": 1})
    save(model.state_dict(), writer)
    report = shardsave.save(model, tmp_path / "own", max_shard_size=4000, metadata={"run": 1})
    assert files(tmp_path / "dcp") == files(tmp_path / "own") and report.shards > 2
    assert writer.report is not None and writer.report.bytes_written == report.bytes_written


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    """Catches a kind of value that is lost, changed, or comes back at another place; and weights that other readers do not find."""
    model, state = trained()
    save(state, StorageWriter(tmp_path, model))
    loaded = emptied(state)
    loaded["nested"]["empty"] = {}
    assert equal(state, load(loaded, StorageReader(tmp_path)))
    fresh = SmallModel(seed=1).requires_grad_(True)
    report = shardsave.load_model(fresh, tmp_path)
    assert same_state(fresh, model) and not fresh.encoder[0].weight.requires_grad and report.verified is True
    stored = {k: v for path in tmp_path.glob("*.safetensors") for k, v in safetensors.torch.load_file(path).items()}
    assert {"embed.weight", "steps", "narrow.bias"} < stored.keys() < model.state_dict().keys()
    assert shardsave.verify(tmp_path).verified is True


def test_a_state_without_its_structure(tmp_path: Path) -> None:
    """Catches a loss of the keys that DCP joins by dots: tools that rebuild a state dict from a checkpoint alone need them."""
    model, state = trained()
    del state["nested"]["empty"]  # DCP itself forgets it
    save(state, StorageWriter(tmp_path, model))
    assert equal(state, _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path)))
    only = _load_state_dict_from_keys("optimizer", storage_reader=StorageReader(tmp_path))
    assert equal({"optimizer": state["optimizer"]}, only)


def test_without_a_model(tmp_path: Path) -> None:
    """Catches tensors that need a model to be stored, flags that are made up, and a training state that nobody asked for."""
    _, state = trained()
    save({"a": state["model"]}, StorageWriter(tmp_path / "nested"))
    assert shardsave.load(tmp_path / "nested").keys() == {f"a.{name}" for name in state["model"]}
    assert shardsave.inspect(tmp_path / "nested").frozen is None
    assert equal({"a": state["model"]}, _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path / "nested")))
    save(state["model"], StorageWriter(tmp_path / "flat"))
    assert not list(tmp_path.glob("flat/training*"))
    save({}, StorageWriter(tmp_path / "nothing"))
    load({}, StorageReader(tmp_path / "nothing"))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    """Catches a dtype that is refused, cast, or read from another place; also without dimensions, without elements, and strided."""
    dtype = BY_NAME[name].torch
    if dtype is None:
        pytest.skip("torch has no such dtype")
    whole = torch.randint(0, 2, (6, 4 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    state = {"whole": whole, "strided": whole.t(), "rows": whole[1:5:2], "scalar": whole[0, 0], "none": whole[:0]}
    if name == "F4":  # two elements lie in one byte
        state = {"whole": whole, "rows": whole[1:5:2], "none": whole[:0]}
    save(state, StorageWriter(tmp_path))
    loaded = {key: torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype) for key, tensor in state.items()}
    assert equal(state, load(loaded, StorageReader(tmp_path)))


class Unstorable:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Unstorable(), "the value 'bad': plain data, a tensor or an object .* it is an Unstorable"),
        ([1, {2, Unstorable}], "the value 'bad'.*"),
        (torch.eye(2).to_sparse(), "'bad': a strided tensor was expected"),
        (torch.empty(2, device="meta"), "'bad': a tensor with data was expected"),
        (torch.empty(2, dtype=torch.complex128), "'bad': dtype complex128"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(value: object, message: str, tmp_path: Path) -> None:
    """Catches a pickle in the place of data, and something left in the directory by a save that fails."""
    save({"w": torch.ones(2)}, StorageWriter(tmp_path))
    before = files(tmp_path)
    with pytest.raises(CheckpointException) as raised:
        save({"w": torch.zeros(2), "bad": value}, StorageWriter(tmp_path))
    with pytest.raises(shardsave.ShardSaveError, match=message):
        raise failure(raised.value)
    assert files(tmp_path) == before


class Pickles(DefaultSavePlanner):
    """A planner of the protocol alone: it has a value only as a pickle."""

    lookup_object = None  # type: ignore[assignment]

    def resolve_data(self, item: Any) -> Any:
        return self.state_dict[item.index.fqn] if item.tensor_data else io.BytesIO(b"pickle")


def test_a_planner_that_only_pickles(tmp_path: Path) -> None:
    """Catches a pickle that is written because the planner has nothing else; tensors need nothing else."""
    save({"w": torch.ones(2)}, StorageWriter(tmp_path), planner=Pickles())
    with pytest.raises(CheckpointException) as raised:
        save({"w": torch.ones(2), "step": 3}, StorageWriter(tmp_path), planner=Pickles())
    assert "'step': a tensor was expected, or a planner with the method lookup_object" in str(failure(raised.value))


class Half(DefaultSavePlanner):
    """Casts what it saves, as torch's documentation suggests."""

    def resolve_data(self, item: Any) -> Any:
        value = super().resolve_data(item)
        return value.to(torch.float16) if isinstance(value, torch.Tensor) else value


class Renaming(DefaultLoadPlanner):
    """Reads names that begin with ``old.`` into others."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner({f"old.{key}": value for key, value in state_dict.items()}, metadata, is_coordinator)


def test_planners_of_users(tmp_path: Path) -> None:
    """Catches tensors that are taken from the state dict and not from the planner, and read to another place than it says."""
    weight = torch.randn(3, 5)
    save({"old.w": weight}, StorageWriter(tmp_path), planner=Half())
    assert shardsave.load(tmp_path)["old.w"].dtype == torch.float16
    loaded = {"w": torch.zeros(3, 5)}
    load(loaded, StorageReader(tmp_path), planner=Renaming())
    assert torch.equal(loaded["w"], weight.half().float())


class Failing(DefaultSavePlanner):
    """Has all values but the last."""

    def resolve_data(self, item: Any) -> Any:
        if item.index.fqn == "z":
            raise RuntimeError("gone")
        return super().resolve_data(item)


def test_a_planner_that_fails(tmp_path: Path) -> None:
    """Catches a checkpoint of what there was before a planner failed, and litter."""
    save({"a": torch.ones(2)}, StorageWriter(tmp_path))
    before = files(tmp_path)
    with pytest.raises(CheckpointException, match="gone"):
        save({"a": torch.zeros(2), "z": torch.ones(2)}, StorageWriter(tmp_path), planner=Failing())
    assert files(tmp_path) == before
    save({"a": torch.zeros(2)}, StorageWriter(tmp_path))
    assert torch.equal(shardsave.load(tmp_path)["a"], torch.zeros(2))


class Waiting(StorageWriter):
    """Begins to write when it is told to."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = threading.Event()

    def set_up_storage_writer(self, *arguments: Any, **options: Any) -> None:
        assert self.gate.wait(60)
        super().set_up_storage_writer(*arguments, **options)


def test_an_asynchronous_save_is_of_its_call(tmp_path: Path) -> None:
    """Catches tensors, values, flags or ties of a later moment, and a tied tensor that is stored twice because it was copied."""
    model, state = trained()
    expected = copy.deepcopy(state)
    writer = Waiting(tmp_path, model)
    future = dcp.async_save(state, storage_writer=writer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.requires_grad_(False)
    state["losses"].append(0.25)
    writer.gate.set()
    future.result()
    loaded = emptied(expected)
    loaded["nested"]["empty"] = {}
    assert equal(expected, load(loaded, StorageReader(tmp_path)))
    stored = shardsave.inspect(tmp_path)
    assert stored.ties == {"head.weight": "embed.weight"}
    fresh = SmallModel()
    shardsave.load_model(fresh, tmp_path)
    assert fresh.embed.weight.requires_grad and not fresh.encoder[0].weight.requires_grad


def test_names_of_wrappers(tmp_path: Path) -> None:
    """Catches weights under the names of wrappers, which no other reader knows, and a state dict that then does not find its own."""
    model = SmallModel()
    wrapped = nn.DataParallel(model)
    for number, (state, given) in enumerate([(wrapped.state_dict(), model), ({"m": wrapped.state_dict()}, wrapped)]):
        save(state, StorageWriter(tmp_path / str(number), given))
        assert shardsave.load(tmp_path / str(number)).keys() == model.state_dict().keys()
        assert equal(state, load(emptied(state), StorageReader(tmp_path / str(number))))
    assert not list(tmp_path.glob("1/training*/*.tensors"))


def test_which_tensors_are_the_weights(tmp_path: Path) -> None:
    """Catches the wrong one of two sets of weights, and tensors that are none of the model's among its weights."""
    model = nn.Linear(2, 3)
    other = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    with pytest.raises(CheckpointException) as raised:
        save({"model": model.state_dict(), "average": other}, StorageWriter(tmp_path, model))
    assert "some below 'average.' and below 'model.'; say with prefix=" in str(failure(raised.value))
    state = {"model": model.state_dict(), "average": other}
    save(state, StorageWriter(tmp_path, model, prefix="average."))
    assert equal(shardsave.load(tmp_path), other) and equal(state, load(emptied(state), StorageReader(tmp_path)))
    with pytest.raises(CheckpointException) as raised:
        save({"model": {"x": torch.ones(2)}}, StorageWriter(tmp_path, model))
    assert "tensors of the model (Linear) were expected in it, it has 1 value: model.x" in str(failure(raised.value))
    with pytest.raises(CheckpointException) as raised:
        save(state, StorageWriter(tmp_path, prefix="modle."))
    assert "tensors with names that begin with 'modle.' were expected in it" in str(failure(raised.value))
    flat = {**model.state_dict(), "step": torch.tensor(3)}
    save(flat, StorageWriter(tmp_path, model))
    assert shardsave.load(tmp_path).keys() == {"weight", "bias"} and equal(flat, load(emptied(flat), StorageReader(tmp_path)))


def test_a_checkpoint_of_anybody(tmp_path: Path) -> None:
    """Catches a reader that needs a checkpoint of its own writer: those of `save`, lone files, ties, names with a prefix."""
    model = SmallModel()
    shardsave.save(model, tmp_path / "own", training={"step": 3}, max_shard_size=4000)
    state = model.state_dict()
    assert equal(state, load(emptied(state), StorageReader(tmp_path / "own")))
    assert equal({"model": state}, load(emptied({"model": state}), StorageReader(tmp_path / "own", prefix="model.")))
    safetensors.torch.save_file({"w": torch.arange(6.0)}, tmp_path / "lone.safetensors")
    assert equal({"w": torch.arange(6.0)}, load({"w": torch.zeros(6)}, StorageReader(tmp_path / "lone.safetensors")))
    reader, path = StorageReader(tmp_path), tmp_path / "lone.safetensors"
    cast = load({"w": torch.zeros(6, dtype=torch.bfloat16)}, reader, checkpoint_id=path)
    assert torch.equal(cast["w"], torch.arange(6.0).bfloat16())


def test_differences_are_told(tmp_path: Path) -> None:
    """Catches a state dict that does not fit and is filled all the same; DCP's switch for partial loads goes on working."""
    save({"w": torch.ones(2)}, StorageWriter(tmp_path))
    for state in ({"other": torch.zeros(2)}, {"w": torch.zeros(3)}, {"w": "text"}):
        with pytest.raises(CheckpointException):
            load(state, StorageReader(tmp_path))
    state = {"w": torch.zeros(2), "other": torch.zeros(2)}
    load(state, StorageReader(tmp_path), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert equal(state, {"w": torch.ones(2), "other": torch.zeros(2)})
    with pytest.raises(CheckpointException, match="no checkpoint|none|not found"):
        load({"w": torch.zeros(2)}, StorageReader(tmp_path / "missing"))


def test_a_flipped_bit(tmp_path: Path) -> None:
    """Catches bytes that are read and not verified, unless the reader was told so."""
    save({"w": torch.ones(1000)}, StorageWriter(tmp_path))
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointException) as raised:
        load({"w": torch.zeros(1000)}, StorageReader(tmp_path))
    assert isinstance(failure(raised.value), shardsave.CorruptCheckpointError)
    load({"w": torch.zeros(1000)}, StorageReader(tmp_path, verify=False))


def test_a_checkpoint_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    """Catches metadata of one save with the bytes of the next one."""
    save({"w": torch.zeros(4)}, StorageWriter(tmp_path))

    class Replacing(StorageReader):
        def set_up_storage_reader(self, *arguments: Any, **options: Any) -> None:
            save({"w": torch.ones(9)}, StorageWriter(tmp_path))

    assert equal({"w": torch.zeros(4)}, load({"w": torch.full((4,), 5.0)}, Replacing(tmp_path)))


def test_a_stale_backward_raises(tmp_path: Path) -> None:
    """Catches memory that is overwritten without a new version: gradients would be computed from other values."""
    weight = nn.Parameter(torch.ones(3))
    save({"w": torch.zeros(3)}, StorageWriter(tmp_path))
    product = (weight * weight).sum()
    load({"w": weight.detach()}, StorageReader(tmp_path))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_second_save(tmp_path: Path) -> None:
    """Catches a writer that cannot be used again, for another directory; and frozen weights that are written each time."""
    model = SmallModel()
    writer = StorageWriter(tmp_path / "a", model, max_shard_size=4000)
    save(model.state_dict(), writer)
    save(model.state_dict(), writer, checkpoint_id=tmp_path / "b")
    assert writer.report is not None and writer.report.path == str(tmp_path / "b") and not writer.report.bytes_reused
    save(model.state_dict(), writer)
    assert writer.report.bytes_reused and writer.report.path == str(tmp_path / "b")
    assert files(tmp_path / "a").keys() >= {"model.safetensors.index.json"}


def test_plans_that_a_planner_keeps(tmp_path: Path) -> None:
    """Catches a second save with ``enable_plan_caching`` that finds no notes in DCP's plan."""
    model = nn.Linear(2, 2)
    cached = [name for name in vars(DefaultSavePlanner.__mro__[1]) if name.startswith("_cached")]
    before = {name: dict(getattr(DefaultSavePlanner, name)) for name in cached}
    try:
        for value in (1.0, 2.0):
            with torch.no_grad():
                model.weight.fill_(value)
            state = {"model": model.state_dict()}
            save(state, StorageWriter(tmp_path, model), planner=DefaultSavePlanner(enable_plan_caching=True))
            assert equal(shardsave.load(tmp_path), model.state_dict())
    finally:
        for name, value in before.items():
            getattr(DefaultSavePlanner, name).clear()
            getattr(DefaultSavePlanner, name).update(value)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: StorageWriter(3), TypeError),  # type: ignore[arg-type]
        (lambda: StorageWriter(""), ValueError),
        (lambda: StorageWriter("d", {"w": torch.ones(1)}), TypeError),  # type: ignore[arg-type]
        (lambda: StorageWriter("d", max_shard_size="many"), ValueError),
        (lambda: StorageWriter("d", metadata={1: 2}), TypeError),  # type: ignore[dict-item]
        (lambda: StorageWriter("d", step=-1), ValueError),
        (lambda: StorageWriter("d", durable=1), TypeError),  # type: ignore[arg-type]
        (lambda: StorageWriter("d", prefix=3), TypeError),  # type: ignore[arg-type]
        (lambda: StorageReader("d", verify=1), TypeError),  # type: ignore[arg-type]
        (lambda: StorageReader("d").reset(3), TypeError),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception]) -> None:
    """Catches a wrong argument that is noticed only when DCP writes, or not at all."""
    with pytest.raises(error):
        make()


def test_without_collectives(tmp_path: Path) -> None:
    """Catches ranks that each write a checkpoint of their own into one directory."""
    writer = StorageWriter(tmp_path)
    with pytest.raises(ValueError, match="use_collectives must be True"):
        writer.set_up_storage_writer(True, rank=1, use_collectives=False)
    assert StorageWriter.validate_checkpoint_id(tmp_path) and not StorageReader.validate_checkpoint_id("s3://bucket/x")


def test_a_tie_with_two_values(tmp_path: Path) -> None:
    """Catches a value that is lost because its tensor is tied in the model, though not in this state dict."""
    model = SmallModel()
    state = dict(model.state_dict())
    state["head.weight"] = state["head.weight"] + 1
    save(state, StorageWriter(tmp_path, model))
    assert equal(shardsave.load(tmp_path), state) and not shardsave.inspect(tmp_path).ties


class Reshaping(DefaultSavePlanner):
    def resolve_data(self, item: Any) -> Any:
        return super().resolve_data(item).reshape(-1)


class ReshapingBack(DefaultLoadPlanner):
    def resolve_tensor(self, item: Any) -> torch.Tensor:
        return super().resolve_tensor(item).reshape(-1)


class Subclass(torch.Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_other_shapes_and_classes(tmp_path: Path) -> None:
    """Catches elements that are stored or read under a shape that DCP's plan does not know, and a class that is lost."""
    with pytest.raises(CheckpointException) as raised:
        save({"w": torch.ones(2, 3)}, StorageWriter(tmp_path), planner=Reshaping())
    assert r"a part of shape [2, 3] was expected, as DCP's plan says, it has [6]" in str(failure(raised.value))
    save({"w": torch.ones(2, 3)}, StorageWriter(tmp_path))
    with pytest.raises(CheckpointException) as raised:
        load({"w": torch.zeros(2, 3)}, StorageReader(tmp_path), planner=ReshapingBack())
    assert "a tensor of shape [2, 3] was expected for 'w'" in str(failure(raised.value))
    state = {"w": torch.zeros(2, 3, dtype=torch.float64).as_subclass(Subclass)}
    load(state, StorageReader(tmp_path))
    assert type(state["w"]) is Subclass and bool((state["w"] == 1).all())
