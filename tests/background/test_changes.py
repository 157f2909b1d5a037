"""Tensors that change while they are read, and no step of an optimizer changes them: the save is right, or fails and names one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

import shardsave
from background.saving import assert_same_tensors, save_behind, training_of
from shardsave.errors import SaveNotCommittedError


class Subject:
    """A model and its optimizer after one step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(520, 520), nn.Linear(520, 520))
        self.model[1].requires_grad_(False)
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)
        self.step()

    def step(self) -> None:
        self.model(torch.ones(2, 520)).square().mean().backward()
        self.optimizer.step()

    @property
    def first(self) -> nn.Parameter:
        return self.model[0].weight  # type: ignore[return-value]


@torch.no_grad()
def add(subject: Subject) -> None:
    subject.first.add_(1)


@torch.no_grad()
def copy_over(subject: Subject) -> None:
    subject.first.copy_(torch.zeros(520, 520))


@torch.no_grad()
def foreach(subject: Subject) -> None:
    torch._foreach_add_(list(subject.model.parameters()), 1.0)


def state_by_hand(subject: Subject) -> None:
    subject.optimizer.state[subject.first]["exp_avg"].zero_()


def frozen(subject: Subject) -> None:
    with torch.no_grad():
        subject.model[1].weight.mul_(2)  # type: ignore[union-attr, operator]


def load(subject: Subject) -> None:
    subject.model.load_state_dict({name: value + 1 for name, value in subject.model.state_dict().items()})


def averaged(subject: Subject) -> None:
    average = AveragedModel(subject.model)
    average.module = subject.model
    average.n_averaged += 1
    average.update_parameters(nn.Sequential(nn.Linear(520, 520), nn.Linear(520, 520)))


def other_memory(subject: Subject) -> None:
    subject.first.data = torch.zeros(520, 520)


def other_dtype(subject: Subject) -> None:
    subject.model.to(torch.float64)


def step_after_other_memory(subject: Subject) -> None:
    subject.first.data = subject.first.data.clone()
    subject.step()


def resized(subject: Subject) -> None:
    subject.first.untyped_storage().resize_(0)


SEEN = [
    add,
    copy_over,
    foreach,
    state_by_hand,
    frozen,
    load,
    averaged,
    other_memory,
    other_dtype,
    step_after_other_memory,
    resized,
]


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_a_change_fails_the_save(change: Callable[[Subject], None], tmp_path: Path) -> None:
    """Catches a checkpoint of which some tensors are of a later moment."""
    subject = Subject()
    shardsave.save(subject.model, tmp_path / "behind", training=training_of([subject.optimizer], None))
    before = shardsave.verify(tmp_path / "behind")
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer], late=change is resized)
    change(subject)
    with pytest.raises(
        SaveNotCommittedError, match=r"cannot save '.*(weight|exp_avg)' while training goes on: its bytes of the"
    ):
        save.wait()
    assert shardsave.verify(tmp_path / "behind").bytes == before.bytes, "the previous checkpoint was harmed"


def load_optimizer(subject: Subject) -> None:
    state = copy.deepcopy(subject.optimizer.state_dict())
    for values in state["state"].values():
        values["exp_avg"].zero_()
    subject.optimizer.load_state_dict(state)
    subject.optimizer.state[subject.first]["exp_avg"].add_(1)


def assign(subject: Subject) -> None:
    subject.model.load_state_dict({name: value + 1 for name, value in subject.model.state_dict().items()}, assign=True)


def new_parameter(subject: Subject) -> None:
    subject.model[0].weight = nn.Parameter(torch.zeros(520, 520))
    subject.model(torch.ones(2, 520)).sum().backward()


def delete(subject: Subject) -> None:
    del subject.model, subject.optimizer
    gc.collect()
    subject.more = [torch.ones(520, 520) for _ in range(20)]  # type: ignore[attr-defined]  # would be put where the model was


def gradients(subject: Subject) -> None:
    subject.model(torch.ones(2, 520)).sum().backward()
    subject.optimizer.zero_grad(set_to_none=False)
    subject.optimizer.zero_grad()


def learning_rate(subject: Subject) -> None:
    for group in subject.optimizer.param_groups:
        group["lr"] = 0.5


def buffers(subject: Subject) -> None:
    subject.model.register_buffer("more", torch.zeros(520, 520))


HARMLESS = [load_optimizer, assign, new_parameter, delete, gradients, learning_rate, buffers]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_a_change_without_harm(change: Callable[[Subject], None], tmp_path: Path) -> None:
    """Catches a save that reads the new objects, or that fails although the memory of the call is as it was."""
    subject = Subject()
    shardsave.save(subject.model, tmp_path / "at-once", training=training_of([subject.optimizer], None))
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer])
    change(subject)
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


@pytest.mark.parametrize("change", [*SEEN, *HARMLESS], ids=lambda change: change.__name__)
def test_a_snapshot_does_not_care(change: Callable[[Subject], None], tmp_path: Path) -> None:
    """Catches a snapshot that looks at memory after the call."""
    subject = Subject()
    shardsave.save(subject.model, tmp_path / "at-once", training=training_of([subject.optimizer], None))
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer], "snapshot")
    change(subject)
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


def unseen(subject: Subject) -> None:
    subject.first.data.add_(1)


def test_check_unchanged(tmp_path: Path) -> None:
    """Catches sums that are not compared: a change that neither version nor address shows."""
    subject = Subject()
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer], check_unchanged=True)
    unseen(subject)
    with pytest.raises(SaveNotCommittedError, match=r"cannot save '0.weight' while .* its checksum is another one"):
        save.wait()
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer], check_unchanged=True)
    save.wait()
    assert shardsave.verify(tmp_path / "behind")


def test_inference_tensors(tmp_path: Path) -> None:
    """Catches a version asked of a tensor that has none."""
    subject = Subject()
    with torch.inference_mode():
        subject.model[1].weight = nn.Parameter(torch.ones(520, 520), requires_grad=False)
    shardsave.save(subject.model, tmp_path / "at-once", training=training_of([subject.optimizer], None))
    save = save_behind(subject.model, tmp_path / "behind", [subject.optimizer])
    assert save.staging.mode == "ring"
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")
