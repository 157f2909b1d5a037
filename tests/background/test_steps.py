"""Optimizers step while a save reads what they hold: the checkpoint is of the moment of the call, and training does not notice.

Method: one training runs without a save. Another, equal one is saved in the middle, at once and in the background; the background save
begins to read only a while after the next step was begun. Both checkpoints must have the same tensors, and both trainings the same end,
bit for bit.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Muon, Optimizer

import shardsave
from background.saving import assert_same_tensors, opened_by_a_step, save_behind, training_of
from support import same_bits

Parameters = Iterable[nn.Parameter]


class Descent(Optimizer):
    """An optimizer of a user: its step is decorated by nobody, and changes parameters in a way that no version shows."""

    def __init__(self, parameters: Parameters, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.data.mul_(0.9).add_(parameter.grad)
                parameter.data.add_(velocity, alpha=-group["lr"])
        return loss


class Sharp(Descent):
    """Changes parameters before it calls the closure, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.001)
        return super().step(closure)


class Run:
    """A small training whose parameters and state are large enough to be read while it goes on."""

    def __init__(self, *optimizers: Callable[[Parameters], Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(520, 520), nn.BatchNorm1d(520), nn.Linear(520, 520))
        parameters = list(self.model.parameters())
        share = -(-len(parameters) // len(optimizers))
        self.optimizers = [make(parameters[n * share : (n + 1) * share]) for n, make in enumerate(optimizers)]
        self.more: Any = None  # what is saved beside the optimizers
        self.steps = 0
        self.step: Callable[[Run], None] = Run.plain_step

    def backward(self) -> torch.Tensor:
        torch.manual_seed(self.steps)
        loss = self.model(torch.randn(4, 520)).square().mean()
        loss.backward()
        return loss

    def plain_step(self) -> None:
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self)
            self.steps += 1

    def tensors(self) -> list[torch.Tensor]:
        state = [v for o in self.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*self.model.state_dict().values(), *state]


def check(tmp_path: Path, make: Callable[[], Run], staging: Any = "auto", mode: str = "ring") -> None:
    """Carries out the method of this file with the training that ``make`` returns. ``mode``: the expected one."""
    undisturbed, run = make(), make()
    undisturbed.train(5)
    run.train(2)
    shardsave.save(run.model, tmp_path / "at-once", training=training_of(run.optimizers, run.more))
    save = save_behind(run.model, tmp_path / "behind", run.optimizers, staging, more=run.more)
    assert save.staging.mode == mode, save.staging.reason
    with opened_by_a_step(save) as asked:
        run.train(3)
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")
    assert all(map(same_bits, run.tensors(), undisturbed.tensors()))
    if mode == "ring":
        assert save.staging.drained_bytes >= 2 * 520 * 520 * 4
        assert asked


OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: AdamW(p, foreach=False),
    "AdamW foreach": lambda p: AdamW(p, foreach=True),
    "AdamW fused": lambda p: AdamW(p, fused=True),
    "Adagrad": lambda p: Adagrad(p),
    "custom": Descent,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name: str, tmp_path: Path) -> None:
    """Catches a step that changes parameters or state before they were read."""
    check(tmp_path, lambda: Run(OPTIMIZERS[name]))


def test_muon(tmp_path: Path) -> None:
    """Catches an optimizer for some of the parameters that is not waited for; the others have one of their own."""

    def make() -> Run:
        run = Run(lambda p: AdamW(p))
        of_kind = [[p for p in run.model.parameters() if (p.dim() == 2) is matrix] for matrix in (True, False)]
        run.optimizers = [Muon(of_kind[0]), AdamW(of_kind[1])]
        return run

    check(tmp_path, make)


def test_several_optimizers(tmp_path: Path) -> None:
    """Catches optimizers after the first one that do not wait."""
    check(tmp_path, lambda: Run(OPTIMIZERS["AdamW fused"], OPTIMIZERS["SGD fused"], OPTIMIZERS["custom"]))


def test_a_snapshot_makes_no_step_wait(tmp_path: Path) -> None:
    """Catches a snapshot that reads memory after the call."""
    check(tmp_path, lambda: Run(OPTIMIZERS["AdamW fused"]), "snapshot", "snapshot")


@pytest.mark.parametrize("before", [True, False], ids=["compiled before the save", "compiled during the save"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_step(before: bool, tmp_path: Path) -> None:
    """Catches a compiled step in which the hook is not called, or in which torch's compiler looks into it."""

    def make() -> Run:
        run = Run(OPTIMIZERS["AdamW foreach"])
        compiled = torch.compile(run.optimizers[0].step, backend="eager")

        def step(run: Run) -> None:
            run.backward()
            (compiled if before or run.steps >= 2 else run.optimizers[0].step)()
            run.optimizers[0].zero_grad()

        run.step = step
        return run

    torch._dynamo.reset()
    check(tmp_path, make)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("name", ["AdamW fused", "custom", "LBFGS", "changes before the closure"])
def test_closures(name: str, keyword: bool, tmp_path: Path) -> None:
    """Catches steps with a closure that do not wait, or lose the result of the closure."""
    makers = {
        **OPTIMIZERS,
        "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3, history_size=2),
        "changes before the closure": Sharp,
    }

    def make() -> Run:
        run = Run(makers[name])

        def step(run: Run) -> None:
            def closure() -> torch.Tensor:
                run.optimizers[0].zero_grad()
                return run.backward()

            loss = run.optimizers[0].step(closure=closure) if keyword else run.optimizers[0].step(closure)
            assert isinstance(loss, torch.Tensor)

        run.step = step
        return run

    check(tmp_path, make)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_a_closure_runs_before_the_wait(keyword: bool, tmp_path: Path) -> None:
    """Catches a step that waits before forward and backward, which the closure runs."""
    run = Run(OPTIMIZERS["AdamW fused"])
    run.train(1)
    save = save_behind(run.model, tmp_path / "behind", run.optimizers, step_timeout=10)

    def closure() -> torch.Tensor:
        loss = run.backward()
        save.gate.set()  # without this the step would wait for ten seconds, and the save would fail
        return loss

    run.optimizers[0].step(closure=closure) if keyword else run.optimizers[0].step(closure)  # type: ignore[call-overload]
    save.wait()


def test_gradient_scaler(tmp_path: Path) -> None:
    """Catches a step that GradScaler makes, and the scale of a later moment."""

    def make() -> Run:
        run = Run(OPTIMIZERS["AdamW fused"])
        run.more = scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

        def step(run: Run) -> None:
            torch.manual_seed(run.steps)
            scaler.scale(run.model(torch.randn(4, 520)).square().mean()).backward()
            scaler.step(run.optimizers[0])
            scaler.update()
            run.optimizers[0].zero_grad()

        run.step = step
        return run

    check(tmp_path, make)


def test_gradient_accumulation(tmp_path: Path) -> None:
    """Catches backward passes that wait, although only steps change what is read."""
    run = Run(OPTIMIZERS["AdamW fused"])
    run.train(1)
    shardsave.save(run.model, tmp_path / "at-once", training=training_of(run.optimizers, None))
    save = save_behind(run.model.train(False), tmp_path / "behind", run.optimizers)
    for _ in range(3):
        run.backward()
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=False)
    assert save.staging.step_wait_seconds == 0
    with opened_by_a_step(save):
        run.train(1)
    save.wait()
    assert_same_tensors(tmp_path / "behind", tmp_path / "at-once")


def test_optimizer_in_backward(tmp_path: Path) -> None:
    """Catches optimizers that step within backward, each with one parameter."""

    def make() -> Run:
        run = Run(OPTIMIZERS["AdamW fused"])
        run.optimizers = [AdamW([p], fused=True) for p in run.model.parameters()]
        for optimizer in run.optimizers:

            def step(_: torch.Tensor, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(step)
        run.step = lambda run: run.backward() and None
        return run

    check(tmp_path, make)


def test_eight_bits(tmp_path: Path) -> None:
    """Catches state in tensors that consist of other tensors, which no step must change either."""
    optim = pytest.importorskip("torchao.optim")
    check(tmp_path, lambda: Run(lambda p: optim.AdamW8bit(p)))


def test_averaged_model(tmp_path: Path) -> None:
    """Catches an average that is read after the call: no hook sees how it changes."""

    def make() -> Run:
        run = Run(OPTIMIZERS["AdamW fused"])
        run.more = average = copy.deepcopy(run.model)

        def step(run: Run) -> None:
            run.plain_step()
            with torch.no_grad():
                for mean, parameter in zip(average.parameters(), run.model.parameters()):
                    mean.lerp_(parameter, 0.5)

        run.step = step
        return run

    check(tmp_path, make)


def test_a_step_on_another_thread(tmp_path: Path) -> None:
    """Catches a guard for steps of the thread that made the call only."""

    def make() -> Run:
        run = Run(OPTIMIZERS["AdamW fused"])

        def step(run: Run) -> None:
            thread = threading.Thread(target=run.plain_step)
            thread.start()
            thread.join()

        run.step = step
        return run

    check(tmp_path, make)


@pytest.mark.parametrize("staging", ["auto", "snapshot"])
def test_save_after_save(staging: Any, tmp_path: Path) -> None:
    """Catches the public verb, called before each step of a training: every checkpoint is of its own moment."""
    undisturbed, run = Run(OPTIMIZERS["AdamW fused"]), Run(OPTIMIZERS["AdamW fused"])
    for step in range(4):
        undisturbed.train(1)
        shardsave.save(undisturbed.model, tmp_path / f"at-once-{step}", training=training_of(undisturbed.optimizers, None))
    pending = []
    for step in range(4):
        run.train(1)
        training = training_of(run.optimizers, None)
        pending.append(shardsave.save_async(run.model, tmp_path / f"behind-{step}", training=training, staging=staging))
    for step, save in enumerate(pending):
        assert save.wait().staging == ("ring" if staging == "auto" else "snapshot")
        assert_same_tensors(tmp_path / f"behind-{step}", tmp_path / f"at-once-{step}")
