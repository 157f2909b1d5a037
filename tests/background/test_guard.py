"""What waits before a step, how long, and what ends it. Nothing that goes wrong here may reach the training."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_pre_hook

import shardsave
from background.saving import assert_same_tensors, hooks, opened_by_a_step, save_behind, staged_only, training_of
from shardsave.errors import SaveNotCommittedError
from support import holds_in_child, same_bits


def large(seed: int = 0) -> nn.Linear:
    """A layer whose weight is read while training goes on."""
    torch.manual_seed(seed)
    layer = nn.Linear(520, 520, bias=False)
    layer.weight.grad = torch.ones(520, 520)
    return layer


def test_a_step_waits_for_its_own_tensors_only() -> None:
    """Catches a step that waits for all that is read, or for tensors that were read already; and one that waits for too few."""
    model = nn.Sequential(large(1), large(2))
    first, second = (SGD([parameter], lr=0.1, fused=True) for parameter in model.parameters())
    staging = staged_only(model, [first, second])
    staging.arm()
    pieces = [piece for shard in staging.contents.all_shards for piece in shard.pieces]
    taken = staging.begin_reading(pieces)
    assert taken is not None
    assert len(taken) == 2
    at = {shard.layout.tensors[n].name: n for shard in staging.contents.shards for n in range(2)}
    taken[at["0.weight"]] = 520 * 520 * 4
    first.step()
    assert staging.step_wait_seconds < 1
    thread = threading.Thread(target=second.step)
    before = model[1].weight.detach().clone()
    thread.start()
    taken[at["1.weight"]] = 520 * 520 * 4 - 1  # the last byte is still in its place
    time.sleep(0.05)
    assert same_bits(model[1].weight, before)
    first.step()
    assert not staging.staged.is_set()
    taken[at["1.weight"]] += 1
    thread.join(10)
    assert not same_bits(model[1].weight, before)
    assert staging.staged.is_set()
    assert hooks() == 0
    staging.check_complete()
    staging.finish()


def test_a_step_that_waited_too_long(tmp_path: Path) -> None:
    """Catches a slow disk that stops the training for good, or that makes it fail."""
    model = large()
    expected = model.weight.detach() - 0.1
    optimizer = SGD(model.parameters(), lr=0.1)
    save = save_behind(model, tmp_path / "behind", [optimizer], step_timeout=0.2)
    started = time.perf_counter()
    optimizer.step()
    assert 0.2 <= time.perf_counter() - started < 5
    assert same_bits(model.weight, expected)
    assert save.staging.staged.wait(5)
    with pytest.raises(
        SaveNotCommittedError, match=r"1 tensor \('weight'\) had to be read before a step of SGD, which has waited for 0.2"
    ):
        save.wait()


def test_letting_go(tmp_path: Path) -> None:
    """Catches a step that waits on for a save that was cancelled, and a commit after that."""
    model = large()
    optimizer = SGD(model.parameters(), lr=0.1)
    save = save_behind(model, tmp_path / "behind", [optimizer])
    timer = threading.Timer(0.05, save.staging.let_go)
    timer.start()
    optimizer.step()
    timer.join()
    assert save.staging.staged.is_set()
    with pytest.raises(SaveNotCommittedError, match="the save was ended before"):
        save.wait()


@pytest.mark.parametrize("own_is_last", [True, False])
def test_hooks_of_others(own_is_last: bool, tmp_path: Path) -> None:
    """Catches torch's "mutated during iteration", raised into a step that waited, and an entry that stays for ever."""
    model = large()
    optimizer = SGD(model.parameters(), lr=0.1)
    calls: list[str] = []
    handles = [register_optimizer_step_pre_hook(lambda *_: calls.append("first"))]
    shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
    save = save_behind(model, tmp_path / "behind", [optimizer])
    if not own_is_last:
        handles.append(register_optimizer_step_pre_hook(lambda *_: calls.append("last")))
    with opened_by_a_step(save):
        optimizer.step()
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")
    assert calls == ["first"] if own_is_last else ["first", "last"]
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert hooks() <= 1  # what stays does nothing; it goes when the next save ends
    save_behind(model, tmp_path / "behind", [optimizer]).wait()
    assert hooks() == 0


class Broken(SGD):
    """An optimizer whose state cannot be looked at."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.broken = False

    def __getattribute__(self, name: str) -> Any:
        if name == "state" and object.__getattribute__(self, "__dict__").get("broken"):
            raise RuntimeError("no state for you")
        return super().__getattribute__(name)


def test_a_hook_that_fails(tmp_path: Path) -> None:
    """Catches an error of the hook that is raised into a step."""
    model = large()
    optimizer = Broken(model.parameters())
    save = save_behind(model, tmp_path / "behind", [optimizer])
    optimizer.broken = True
    expected = model.weight.detach() - 0.1
    optimizer.step()  # without momentum a step needs no state
    assert same_bits(model.weight, expected)
    with pytest.raises(
        SaveNotCommittedError, match="the tensors of Broken were expected, its state raised RuntimeError: no state"
    ):
        save.wait()


def test_an_interrupt_of_a_waiting_step(tmp_path: Path) -> None:
    """Catches Ctrl-C that is lost in a step that waits, and a save that suffers from it."""
    model = large()
    optimizer = SGD(model.parameters(), lr=0.1)
    shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
    save = save_behind(model, tmp_path / "behind", [optimizer])
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        optimizer.step()
    timer.join()
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


def test_a_forked_child(tmp_path: Path) -> None:
    """Catches a child whose step waits for a thread that only its parent has."""
    model = large()
    optimizer = SGD(model.parameters(), lr=0.1)
    save = save_behind(model, tmp_path / "behind", [optimizer])
    before = model.weight.detach().clone()

    def steps() -> bool:
        torch.set_num_threads(1)  # OpenMP hangs in a forked child
        optimizer.step()
        return not torch.equal(model.weight, before)

    assert holds_in_child(steps)
    assert same_bits(model.weight, before)
    save.wait()


def test_an_unfrozen_layer(tmp_path: Path) -> None:
    """Catches tensors that an optimizer got only after the call."""
    model = nn.Sequential(large(1), large(2))
    model[1].requires_grad_(False)
    optimizer = AdamW(model[0].parameters(), fused=True)
    shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
    save = save_behind(model, tmp_path / "behind", [optimizer])
    model[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    with opened_by_a_step(save):
        optimizer.step()
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


@pytest.mark.parametrize("is_small", [False, True])
def test_a_frozen_teacher(is_small: bool) -> None:
    """Catches a step that waits for the student alone: right after it the teacher follows, by changes that torch does not count. Of a
    small student nothing is waited for, since it is copied in the call; the teacher is not."""
    model = nn.ModuleDict({"teacher": large(1).requires_grad_(False), "student": large(2)})
    moved = model["student"].weight
    if is_small:
        moved.requires_grad_(False)
        moved = nn.Parameter(torch.ones(2))
        model.register_parameter("head", moved)
        moved.grad = torch.ones(2)
    optimizer = SGD([moved], lr=0.1, fused=True)
    staging = staged_only(model, [optimizer], "ring")
    staging.arm()
    shards = staging.contents.all_shards
    taken = staging.begin_reading([piece for shard in shards for piece in shard.pieces])
    assert taken is not None
    at = {name: n for n, name in enumerate(tensor.name for shard in shards for tensor in shard.layout.tensors)}
    taken[at["student.weight"]] = 520 * 520 * 4
    before = moved.detach().clone()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    time.sleep(0.05)
    assert same_bits(moved, before)
    taken[at["teacher.weight"]] = 520 * 520 * 4
    thread.join(10)
    assert not same_bits(moved, before)
    staging.check_complete()
    staging.finish()


def test_other_parameters_with_the_same_memory(tmp_path: Path) -> None:
    """Catches a step that is let go because its Parameter is another object over the memory that is read."""
    model = large()
    alias = nn.Parameter(model.weight.data)
    alias.grad = torch.ones(520, 520)
    optimizer = SGD(model.parameters(), lr=0.1)
    shardsave.save(model, tmp_path / "at-once", training=training_of([optimizer], None))
    save = save_behind(model, tmp_path / "behind", [optimizer])
    with opened_by_a_step(save):
        SGD([alias], lr=0.1, fused=True).step()
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")
