"""`CheckpointManager` with a training state: what is resumed is the training that never stopped, bit for bit, whatever ended it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardsave
from faults.dying import die
from shardsave._storage.transaction import Transaction
from support import forked
from training_state import training_directory

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks

LAST = 12


class Training:
    """A model, its optimizer, a scheduler and an averaged model; each step takes numbers from all three generators."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.model[0].bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    @property
    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "average": self.average}

    def step(self) -> float:
        scale = random.random() + float(np.random.rand())
        loss = (self.model(torch.randn(4, 6)) * scale - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.average.update_parameters(self.model)
        return loss.item()


def manager_of(folder: Path, **options: Any) -> shardsave.CheckpointManager:
    given = {"save_every": 4, "rng": True, "durable": False, "progress": False, **options}
    return shardsave.CheckpointManager(folder / "run", **given)


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def run(folder: Path, last: int = LAST, **options: Any) -> dict[int, float]:
    """Trains up to ``last``, from where the run ended. Returns the loss of each step."""
    manager_options = {name: options.pop(name) for name in ("keep_last", "keep_best") if name in options}
    training = Training()
    seed()
    losses: dict[int, float] = {}
    with manager_of(folder, **manager_options) as manager:
        resumed = manager.resume(training.model, training=training.state)
        for step in range(resumed.next_step if resumed else 1, last + 1):
            losses[step] = training.step()
            manager.step(step, training.model, training=training.state, metrics={"loss": losses[step]}, **options)
    return losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the training that nothing ended."""
    return run(tmp_path_factory.mktemp("straight"))


def dies_in_child(action: Callable[[], object]) -> bool:
    """Whether SIGKILL ends a forked child that runs ``action``."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(action), 0)[1]) == -signal.SIGKILL


def path_of(folder: Path, step: int) -> Path:
    return folder / "run" / f"step-{step:08d}"


def test_the_generators_of_a_manager(memory: Path, straight: dict[int, float]) -> None:
    """Catches ``rng=True`` of a manager that its saves obey and its resumes do not, and a resume that cannot override it."""
    first = run(memory, last=8)
    assert {**first, **run(memory)} == straight
    training = Training(5)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    resumed = manager_of(memory).resume(training.model, training=training.state, rng=False)
    assert resumed is not None and resumed.step == 12 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("moment", ["writing", "_publish", "_clean"])
def test_killed_in_the_middle_of_a_save(memory: Path, straight: dict[int, float], moment: str) -> None:
    """Catches a killed save whose step is resumed in part, or that harms the step before it, and a resume that is another training."""
    first = run(memory, last=4)

    def work() -> None:
        if moment == "writing":
            run(memory, progress=die)
        else:
            setattr(Transaction, moment, die)
            run(memory)

    assert dies_in_child(work)
    committed = [info.step for info in manager_of(memory).steps() if info.committed]
    assert committed == ([4, 8] if moment == "_clean" else [4])
    rest = run(memory, keep_last=1)
    assert min(rest) == committed[-1] + 1
    losses = {**{step: straight[step] for step in range(5, min(rest))}, **first, **rest}
    assert losses == straight
    assert [info.step for info in manager_of(memory).steps()] == [12]


def flip_tensor(path: Path, of: str) -> None:
    """Changes a bit of the first tensor of the training state whose name has ``of`` in it."""
    (file,) = training_directory(path).glob("*.tensors")
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + length])
    flip(file, 8 + length + next(entry["data_offsets"][0] for name, entry in header.items() if of in name))


def damage_optimizer(path: Path) -> None:
    flip_tensor(path, "exp_avg")


def damage_average(path: Path) -> None:
    flip_tensor(path, "average")


def damage_index(path: Path) -> None:
    flip(training_directory(path) / "index.json", 60)


def damage_leaves(path: Path) -> None:
    (training_directory(path) / "rank-00000.json").unlink()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_optimizer, damage_average, damage_index, damage_leaves])
def test_a_corrupt_training_state(memory: Path, straight: dict[int, float], damage: Callable[[Path], None]) -> None:
    """Catches a step whose training state is damaged and that is resumed all the same, and a training that is put together from two
    steps: model, optimizer, averaged model and generators must all come from the one before."""
    run(memory)
    damage(path_of(memory, 12))
    training = Training(7)
    seed()
    resumed = manager_of(memory).resume(training.model, training=training.state)
    assert resumed is not None and resumed.step == 8
    assert any(f"{path_of(memory, 12)} is corrupt and was passed over" in note for note in resumed.notes)
    assert {step: training.step() for step in range(9, 13)} == {step: straight[step] for step in range(9, 13)}
    expected = Training()
    shardsave.resume(path_of(memory, 8), expected.model, training=expected.state)
    seed()
    again = Training(8)
    manager_of(memory).resume(again.model, training=again.state)
    assert all(torch.equal(a, b) for a, b in zip(again.average.state_dict().values(), expected.average.state_dict().values()))
    with pytest.raises(shardsave.CorruptCheckpointError, match="step-00000012"):
        manager_of(memory, on_corrupt="raise").resume(training.model, training=training.state)


def test_the_best_steps_with_their_training(memory: Path, straight: dict[int, float]) -> None:
    """Catches a removal that leaves the directory of a training state, and a best step from which training cannot go on."""
    run(memory, keep_best=("loss", "min", 1), keep_last=1)
    best = min((4, 8, 12), key=lambda step: straight[step])
    left = sorted({best, 12})
    assert sorted(path.name for path in (memory / "run").glob("step-*")) == [f"step-{step:08d}" for step in left]
    training = Training(3)
    resumed = shardsave.resume(path_of(memory, best), training.model, training=training.state, rng=True)
    assert resumed.next_step == best + 1
    later = [step for step in range(best + 1, LAST + 1)]
    assert [training.step() for _ in later] == [straight[step] for step in later]


def test_a_last_save_of_a_training(memory: Path, straight: dict[int, float]) -> None:
    """Catches a last save after SIGTERM that lacks the training state, or that does not happen between two steps."""

    def work() -> None:
        training = Training()
        seed()
        with manager_of(memory) as manager:
            manager.save_on_signal(signal.SIGTERM)
            for step in range(1, LAST + 1):
                loss = training.step()
                if step == 6:
                    os.kill(os.getpid(), signal.SIGTERM)
                manager.step(step, training.model, training=training.state, metrics={"loss": loss})
                if manager.preempted:
                    break

    assert os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == 0
    assert [info.step for info in manager_of(memory).steps()] == [4, 6]
    assert run(memory) == {step: straight[step] for step in range(7, LAST + 1)}


def test_wrong_keywords_of_a_resume(memory: Path) -> None:
    """Catches a wrong keyword that shows only once there is a step: when the training has crashed."""
    with pytest.raises(TypeError, match="keywords of resume were expected, not trainnig"):
        manager_of(memory).resume(nn.Linear(2, 2), trainnig={})


def test_a_step_without_a_training(memory: Path) -> None:
    """Catches a run of bare models that is taken for one that can be resumed, and a refusal that changes the model."""
    training = Training()
    with manager_of(memory, rng=False) as manager:
        manager.save(4, Training(1).model)
        before = [parameter.clone() for parameter in training.model.parameters()]
        with pytest.raises(
            shardsave.IncompatibleCheckpointError, match="a training state was expected, the checkpoint has none"
        ):
            manager.resume(training.model, training=training.state)
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters()))
