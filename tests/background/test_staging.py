"""How a save is staged: what is copied in the call, what is read later, why, and in which memory."""

from __future__ import annotations

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import shardsave
from background.saving import assert_same_tensors, save_behind, staged_only, training_of
from shardsave._background import snapshot
from shardsave._common.free_memory import FreeMemory
from shardsave._format.crc64 import crc64
from shardsave.errors import OutOfMemoryError
from support import SmallModel


def model_of(trainable: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(520, 520), nn.BatchNorm1d(520)).requires_grad_(trainable)


def trained(model: nn.Module, **options: Any) -> AdamW:
    optimizer = AdamW(model.parameters(), **options)
    model(torch.ones(2, 520)).square().sum().backward()
    optimizer.step()
    return optimizer


def drained_names(staging: Any) -> set[str]:
    """The names of stored tensors whose sources are still live memory."""
    return {
        tensor.name
        for shard in staging.contents.all_shards
        for tensor, piece in zip(shard.layout.tensors, shard.pieces)
        if not isinstance(piece, snapshot.SnapshotSource)
    }


def test_what_is_read_later() -> None:
    """Catches buffers, small tensors or tensors of nobody that are read after the call, and large state that is copied in it."""
    model = model_of()
    model.register_buffer("large", torch.zeros(520, 520))
    staging = staged_only(model, [trained(model)], more={"average": [torch.zeros(520, 520)]})
    assert staging.mode == "ring"
    assert drained_names(staging) == {"0.weight", "optimizers/0/0.weight/exp_avg", "optimizers/0/0.weight/exp_avg_sq"}
    assert staging.drained_bytes == 3 * 520 * 520 * 4
    small = sum(p.nbytes for p in model.parameters()) - 520 * 520 * 4
    others = sum(b.nbytes for b in model.buffers())
    assert (
        staging.copied_bytes == 3 * small + others + 4 * 4 + 520 * 520 * 4
    )  # `step` is a number of four bytes for each parameter
    assert not staging.staged.is_set()
    staging.finish()
    assert staging.staged.is_set()


def test_what_steps_wait_for_is_read_first(tmp_path: Path) -> None:
    """Catches a step that waits for the frozen part of a model, which no step changes; and an index in another order than `save` makes."""
    model = nn.Sequential(nn.Linear(520, 520).requires_grad_(False), nn.Linear(520, 520))
    optimizer = AdamW(model[1].parameters())
    model(torch.ones(2, 520)).sum().backward()
    optimizer.step()
    shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
    save = save_behind(model, tmp_path / "behind", [optimizer])
    name_of = {
        id(piece): tensor.name
        for shard in save.contents.all_shards
        for tensor, piece in zip(shard.layout.tensors, shard.pieces)
    }
    save.wait()
    read = [name_of[piece] for piece in save.read]
    assert len(read) == 4 + 2 * 3
    assert read.index("0.weight") > max(read.index(name) for name in read if "exp_avg" in name or name == "1.weight")
    orders = []
    for folder in ("at-once", "behind"):
        index = (tmp_path / folder / "model.safetensors.index.json").read_text()
        orders.append(re.findall(r'"(model|training)-[0-9a-f]+([-/][^"]*)"', index))
    assert orders[0] == orders[1]
    assert len(orders[0]) > 3


def test_casts_and_strides_are_copied() -> None:
    """Catches sources that torch has to gather element by element, on a thread beside the training."""
    model = model_of()
    model[0].weight = nn.Parameter(torch.zeros(520, 520).t())
    staging = staged_only(model, [trained(model)])
    assert "0.weight" not in drained_names(staging)
    staging.finish()


REASONS: dict[str, tuple[Any, str, str]] = {
    "all parameters are owned": (lambda m: [AdamW(m.parameters())], "ring", "own every trainable parameter"),
    "no optimizer": (lambda m: [], "snapshot", "training= names no optimizer"),
    "one parameter is nobody's": (
        lambda m: [SGD([m[0].weight], lr=1)],
        "snapshot",
        "no optimizer .* trainable parameter '0.bias'",
    ),
    "the others are frozen": (
        lambda m: m.requires_grad_(False) and [SGD([m[0].weight.requires_grad_(True)], lr=1)],
        "ring",
        "own every trainable parameter",
    ),
    "capturable": (lambda m: [AdamW(m.parameters(), capturable=True)], "snapshot", "AdamW is capturable"),
    "one of two is capturable": (
        lambda m: [SGD([m[0].weight], lr=1), AdamW([m[0].bias, *m[1].parameters()], capturable=True)],
        "snapshot",
        "AdamW is capturable",
    ),
    "shared memory": (lambda m: m.share_memory() and [AdamW(m.parameters())], "snapshot", "memory that other processes share"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_auto_chooses(case: str, tmp_path: Path) -> None:
    """Catches a ring where steps may change parameters that no hook sees, and a snapshot without need."""
    optimizers, mode, reason = REASONS[case]
    model = model_of()
    save = save_behind(model, tmp_path / "behind", optimizers(model))
    assert (save.staging.mode, bool(re.search(reason, save.staging.reason))) == (mode, True), save.staging.reason
    save.wait()


def test_auto_with_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ring in one of several processes, whose steps would wait for one another."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = model_of()
    staging = staged_only(model, [AdamW(model.parameters())])
    assert (staging.mode, "several processes" in staging.reason) == ("snapshot", True)
    staging.finish()


def test_a_mapping_is_copied(tmp_path: Path) -> None:
    """Catches tensors of a mapping that are read after the call."""
    model = model_of()
    save = save_behind(model.state_dict(), tmp_path / "behind")
    assert (save.staging.mode, "mapping" in save.staging.reason) == ("snapshot", True)
    shardsave.save(model.state_dict(), tmp_path / "at-once")
    model[0].weight.data.zero_()
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no optimizer", "training= names no optimizer that owns a parameter; pass it in training=, or use"),
        ("one parameter is nobody's", "trainable parameter '0.bias'; pass its optimizer in training=, freeze it, or use"),
        ("capturable", "AdamW is capturable, and no hook runs when a CUDA graph steps; use staging='snapshot'"),
    ],
)
def test_a_ring_that_cannot_be_right(case: str, reason: str) -> None:
    """Catches a ring that was requested where nothing makes steps wait."""
    model = model_of()
    with pytest.raises(ValueError, match=re.escape(reason)):
        staged_only(model, REASONS[case][0](model), "ring")
    with pytest.raises(ValueError, match="own the tensors of a mapping; pass the module"):
        staged_only(model.state_dict(), [], "ring")


def test_a_call_within_a_step(tmp_path: Path) -> None:
    """Catches a save from a closure, after whose return the step changes what no hook guards any more."""
    model = model_of()
    optimizer = AdamW(model.parameters(), fused=True)
    saves = []

    def closure() -> torch.Tensor:
        loss = model(torch.ones(2, 520)).square().sum()
        loss.backward()
        shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
        saves.append(save_behind(model, tmp_path / "behind", [optimizer]))
        return loss

    optimizer.step(closure)
    assert (saves[0].staging.mode, "inside a step" in saves[0].staging.reason) == ("snapshot", True)
    saves[0].wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


def test_sums_of_copies() -> None:
    """Catches a checksum that is not that of the bytes of its copy."""
    model = SmallModel()
    staging = staged_only(model, [], "snapshot")
    pieces = [piece for shard in staging.contents.all_shards for piece in shard.pieces]
    assert len(pieces) > 5
    for piece in pieces:
        assert isinstance(piece, snapshot.SnapshotSource)
        view = memoryview(bytearray(piece.nbytes))
        piece.gather(0, view)
        assert crc64(view) == piece.crc
    staging.finish()


def test_a_snapshot_lets_the_model_go() -> None:
    """Catches contents that keep a deleted model in memory until the save ends, tied tensors too."""
    model = SmallModel()
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    staging = staged_only(model, [], "snapshot")
    sources = {id(entry.source) for entry in staging.contents.state.entries}
    assert len(sources) == len([e for e in staging.contents.state.entries if e.tied_to is None])
    del model
    gc.collect()
    assert not any(reference() is not None for reference in (*alive, *storages))
    assert all(isinstance(entry.source, snapshot.SnapshotSource) for entry in staging.contents.state.entries)
    staging.finish()


def test_an_ended_ring_lets_the_model_go(tmp_path: Path) -> None:
    """Catches a staging that somebody still has, and that keeps the memory of a deleted model."""
    model = model_of()
    save = save_behind(model, tmp_path / "behind", [AdamW(model.parameters())])
    assert save.staging.drained_bytes
    save.wait()
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    staging = save.staging
    del model, save
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert staging.staged.is_set()


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that is allocated anew for each save, or is used by two saves at a time; and memory that is never freed."""
    allocated: list[int] = []
    original = snapshot.HostMemory

    def counting(nbytes: int, *, device: int = -1) -> Any:
        allocated.append(nbytes)
        return original(nbytes, device=device)

    monkeypatch.setattr(snapshot, "HostMemory", counting)
    model = model_of()
    for _ in range(3):
        staged_only(model, [], "snapshot").finish()
    assert len(allocated) == 1
    both = [staged_only(model, [], "snapshot") for _ in range(2)]
    for staging in both:
        staging.finish()
    assert len(allocated) == 2
    staged_only(model, [trained(model)], "snapshot").finish()  # needs three times as much
    assert len(allocated) == 3
    assert allocated[2] >= 2 * allocated[0]
    staged_only(model, [], "snapshot").finish()
    assert len(allocated) == 3
    snapshot.release_snapshot_memory()
    staged_only(model, [], "snapshot").finish()
    assert len(allocated) == 4


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 1 MB of free memory, on which nothing is allocated for a snapshot."""
    monkeypatch.setattr(snapshot, "_SMALL", 0)
    monkeypatch.setattr(snapshot, "free_memory", lambda: FreeMemory(1_000_000, 5_000_000_000, "control group /jobs"))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("memory was allocated")

    monkeypatch.setattr(snapshot, "HostMemory", refuse)


@pytest.mark.usefixtures("little_memory")
def test_a_snapshot_that_does_not_fit(tmp_path: Path) -> None:
    """Catches an allocation that the kernel would answer by ending the process, and a refusal without numbers."""
    model = model_of()
    numbers = r"2\.1 MB of memory were expected, control group /jobs has 1\.0 MB free"
    with pytest.raises(OutOfMemoryError, match=f"cannot copy what is saved: {numbers}; .*; nothing was written"):
        staged_only(model, [], "snapshot")
    staging = staged_only(model, [], "auto")
    assert (staging.mode, bool(re.search(numbers, staging.reason))) == ("blocking", True)
    assert staging.copied_bytes == 0
    shardsave.save(model, tmp_path / "at-once")
    staging.arm()
    staging.check_complete()
    staging.finish()


def test_an_error_in_the_call_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that stays lost after a call that failed or was interrupted."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    model = model_of()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(snapshot, "take", fail)
        staged_only(model, [], "snapshot")
    assert len(snapshot._kept) == 1
