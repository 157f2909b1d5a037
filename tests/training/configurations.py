"""Trainings to interrupt: each builds a model and its training state, and makes steps. Run as a program, it trains or resumes all of them.

``python configurations.py train FOLDER``: trains each for 20 steps, then again for 10, and saves that in FOLDER. ``… resume FOLDER``:
resumes each, also with other groups, and trains it for the other 10. Both print JSON: configuration → a digest of everything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate

import shardsave

HALF = 10


class Run(NamedTuple):
    """``step``: makes one step of the training, given its number. ``extra``: what belongs to the result beside model and training."""

    model: nn.Module
    training: dict[str, Any]
    step: Callable[[int], None]
    extra: Callable[[], Any] = lambda: None


class MasterAdam(torch.optim.Optimizer):
    """Keeps its state and a copy of the parameters in float32, whatever the dtype of the parameters; also text and lists."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(master=p.float(), average=[torch.zeros_like(p, dtype=torch.float32)] * 2, note="text", count=0)
                state["count"] += 1
                state["average"] = [a.lerp(p.grad.float(), 0.1) for a in state["average"]]
                state["master"] -= group["lr"] * state["average"][0] / (state["average"][1].abs() + 1e-3)
                p.copy_(state["master"])


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)
    model[0].to(memory_format=torch.channels_last)
    model[3].requires_grad_(False)  # in the optimizer, but never stepped
    return model


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 2, 4, 4, generator=generator).to(next(model.parameters()).dtype)
    return model(x).float().pow(2).mean()


def groups(model: nn.Module, swapped: bool = False, left_out: bool = False) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad or not left_out]
    large = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1, "lr": 1e-2}
    small = {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-2}
    return [small, large] if swapped else [large, small]


def plain(make: Callable[[Any], Any], schedule: Any = None, dtype: torch.dtype = torch.float32) -> Callable[..., Run]:
    """One optimizer, and a scheduler if ``schedule`` makes one."""

    def build(**how: bool) -> Run:
        model = net(dtype)
        optimizer = make(groups(model, **how))
        training = {"optimizer": optimizer}
        if schedule is not None:
            training["scheduler"] = schedule(optimizer)

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                plateau = isinstance(training["scheduler"], schedulers.ReduceLROnPlateau)
                training["scheduler"].step(*([1.0] if plateau else []))

        return Run(model, training, step, lambda: sorted(float(g["lr"]) for g in optimizer.param_groups))

    return build


def sequential(optimizer: Any) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=5), by_group(optimizer)]
    return schedulers.SequentialLR(optimizer, parts, [5])


def chained(optimizer: Any) -> Any:
    parts = [
        schedulers.ExponentialLR(optimizer, 0.9),
        by_group(optimizer),
        schedulers.MultiplicativeLR(optimizer, lambda _: 0.95),
    ]
    return schedulers.ChainedScheduler(parts, optimizer=optimizer)


def by_group(optimizer: Any) -> Any:
    """Lambdas and learning rates that belong to a group."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return schedulers.LambdaLR(optimizer, [functools.partial(lambda rate, n: 1 + rate * n, rate) for rate in rates])


def one_cycle(optimizer: Any) -> Any:
    return schedulers.OneCycleLR(optimizer, [3 * group["lr"] for group in optimizer.param_groups], total_steps=25)


def cyclic(optimizer: Any) -> Any:
    rates = [group["lr"] for group in optimizer.param_groups]
    return schedulers.CyclicLR(optimizer, rates, [4 * rate for rate in rates], step_size_up=3, cycle_momentum=False)


def plateau(optimizer: Any) -> Any:
    rates = [group["lr"] / 3 for group in optimizer.param_groups]
    return schedulers.ReduceLROnPlateau(optimizer, patience=2, min_lr=rates)


def lbfgs(**how: bool) -> Run:
    model = net()[2:]  # LBFGS takes no channels_last
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=3, history_size=5)

    def step(number: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(8, 16, generator=torch.Generator().manual_seed(number))).pow(2).mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    return Run(model, {"optimizer": optimizer}, step)


def several(**how: bool) -> Run:
    """Two optimizers of one model, and one of a second module that is part of the training state."""
    model, critic = net(), nn.Linear(4, 1)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    training: dict[str, Any] = {
        "optimizers": [
            getattr(torch.optim, "Muon", torch.optim.RAdam)(matrices, lr=1e-2),  # torch 2.8 has no Muon
            torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=torch.tensor(1e-2), capturable=False),
        ],
        "critic": {"module": critic, "optimizer": torch.optim.Adam(critic.parameters(), 1e-2)},
    }
    training["schedulers"] = tuple(schedulers.CosineAnnealingLR(o, 20) for o in training["optimizers"])
    optimizers = [*training["optimizers"], training["critic"]["optimizer"]]

    def step(number: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        generator = torch.Generator().manual_seed(number)
        critic(model(torch.randn(8, 2, 4, 4, generator=generator))).pow(2).mean().backward()
        for part in [*optimizers, *training["schedulers"]]:
            part.step()

    return Run(model, training, step)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x + random.random() * np.random.rand())


class Batches:
    """Batches in a shuffled order, and the state of it."""

    def __init__(self, data: list[Any]) -> None:
        self._data, self._order, self._next = data, torch.randperm(len(data)), 0

    def __iter__(self) -> Iterator[Any]:
        while self._next < len(self._data):
            self._next += 4
            yield default_collate([self._data[at] for at in self._order[self._next - 4 : self._next]])
        self._order, self._next = torch.randperm(len(self._data)), 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._next = state["order"], state["next"]


def stateful_loader(data: list[Any]) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler

    # Each new iterator of the loader draws a number, from torch's generator if it has none of its own.
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    return StatefulDataLoader(data, batch_size=4, sampler=sampler, generator=torch.Generator())


def everything(make_loader: Callable[[list[Any]], Any], **how: bool) -> Run:
    """Dropout, batch norm, noise of three libraries, a scaler, an average with buffers, the order of data, generators."""
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    data = [(torch.full((3,), float(n)), n) for n in range(28)]
    loader = make_loader(data)
    own = {"torch": torch.Generator().manual_seed(1), "numpy": np.random.default_rng(2), "python": random.Random(3)}
    own["old"] = np.random.RandomState(4)
    training: dict[str, Any] = {
        "optimizer": optimizer,
        "scheduler": SWALR(optimizer, 0.05, anneal_epochs=15),
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "loader": shardsave.PerRank(loader),
        "generators": own,
        "seen": torch.zeros(28),
        "histogram": np.zeros(4, np.float32),
        "epoch": 3,
    }
    batches: list[Iterator[Any]] = []

    def step(number: int) -> None:
        if not batches:
            batches.append(iter(loader))
        try:
            x, picked = next(batches[0])
        except StopIteration:
            batches[0] = iter(loader)
            x, picked = next(batches[0])
        training["seen"][picked] += number
        training["histogram"][number % 4] += own["numpy"].random() + own["python"].random() + own["old"].rand()
        x = x / 28 + torch.rand(3, generator=own["torch"])
        optimizer.zero_grad()
        scaler = training["scaler"]
        scaler.scale(model(x).pow(2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        training["scheduler"].step()
        training["ema"].update_parameters(model)

    return Run(
        model, training, step, lambda: (random.random(), np.random.rand(), torch.rand(2), training["scaler"].get_scale())
    )


def accelerated(**how: bool) -> Run:
    import accelerate

    run = plain(torch.optim.AdamW, lambda o: schedulers.ExponentialLR(o, 0.9))(**how)
    accelerator = accelerate.Accelerator(cpu=True)
    return run._replace(training=dict(zip(run.training, accelerator.prepare(*run.training.values()))))


def low_bits(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    """An optimizer of torchao, with a state of 8 or 4 bits for matrices that are large enough; a rate that is a tensor."""
    import torchao.optim

    torch.compiler.set_stance("force_eager")
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 128), nn.Linear(128, 64)).to(dtype)
    optimizer = getattr(torchao.optim, name)(model.parameters(), 1e-2, **options)
    scheduler = schedulers.LambdaLR(optimizer, lambda n: 0.9**n)

    def step(number: int) -> None:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number)).to(dtype)
        model(x).float().pow(2).mean().backward()
        optimizer.step()
        scheduler.step()

    state = lambda: [s.dequantize().tolist() for s in optimizer.state[model[2].weight].values() if hasattr(s, "dequantize")]
    return Run(model, {"optimizer": optimizer, "scheduler": scheduler}, step, state)


LOW_BITS: dict[str, Callable[..., Run]] = {
    "AdamW8bit": functools.partial(low_bits, "AdamW8bit"),
    "AdamW8bit bf16": functools.partial(low_bits, "AdamW8bit", torch.bfloat16, bf16_stochastic_round=True),
    "AdamW4bit": functools.partial(low_bits, "AdamW4bit"),
    "AdamWFp8": functools.partial(low_bits, "AdamWFp8"),
}


def configurations() -> dict[str, Callable[..., Run]]:
    from transformers.optimization import Adafactor

    optim = torch.optim
    return {
        "AdamW": plain(functools.partial(optim.AdamW, foreach=False), sequential),
        "AdamW foreach": plain(functools.partial(optim.AdamW, foreach=True), by_group),
        "AdamW fused amsgrad": plain(functools.partial(optim.AdamW, fused=True, amsgrad=True), one_cycle),
        "AdamW bf16": plain(optim.AdamW, cyclic, torch.bfloat16),
        "float32 state of bfloat16": plain(functools.partial(MasterAdam, lr=1e-2), sequential, torch.bfloat16),
        "SGD": plain(functools.partial(optim.SGD, momentum=0.9, nesterov=True), plateau),
        "SGD without state": plain(optim.SGD),
        "Adafactor": plain(functools.partial(Adafactor, relative_step=False, scale_parameter=False), by_group),
        "Adafactor bf16": plain(
            functools.partial(Adafactor, relative_step=False, scale_parameter=False, beta1=0.9), sequential, torch.bfloat16
        ),
        "torch Adafactor": plain(optim.Adafactor, chained),
        "NAdam": plain(optim.NAdam, chained),
        "RAdam": plain(optim.RAdam),
        "RMSprop": plain(functools.partial(optim.RMSprop, momentum=0.9, centered=True)),
        "Rprop": plain(lambda groups: optim.Rprop([{**g, "weight_decay": None} for g in groups])),
        "Adagrad": plain(optim.Adagrad),
        "ASGD": plain(optim.ASGD),
        "LBFGS": lbfgs,
        "several": several,
        "everything": functools.partial(everything, Batches),
        **({"torchdata": functools.partial(everything, stateful_loader)} if find_spec("torchdata") else {}),
        "accelerate": accelerated,
        **(LOW_BITS if find_spec("torchao") else {}),
    }


#: What a resumed training may do differently, for the configurations that can.
WAYS: dict[str, dict[str, bool]] = {
    "": {},
    "groups swapped": {"swapped": True},
    "frozen left out": {"left_out": True},
    "both": {"swapped": True, "left_out": True},
}
FIXED = ("LBFGS", "several", "everything", "torchdata", "accelerate", *LOW_BITS)


def digest(run: Run) -> str:
    """Of the model, the tensors of the training state, and the extra results."""
    sha = hashlib.sha256()
    for tensor in run.model.state_dict().values():
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for value in run.training.values():
        if isinstance(value, AveragedModel):
            for tensor in value.state_dict().values():
                sha.update(tensor.numpy().tobytes())
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            sha.update(repr(value.tolist()).encode())
    sha.update(repr(run.extra()).encode())
    return sha.hexdigest()


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def train(folder: Path) -> dict[str, Any]:
    digests = {}
    for name, build in configurations().items():
        seed(7)
        run = build()
        for number in range(1, 2 * HALF + 1):
            run.step(number)
        digests[name] = digest(run)
        seed(7)
        run = build()
        for number in range(1, HALF + 1):
            run.step(number)
        steps: list[Any] = []
        hook = register_optimizer_step_pre_hook(lambda *arguments: steps.append(arguments))
        before = random.getstate(), torch.get_rng_state().tolist()
        shardsave.save(run.model, folder / name, training=run.training, rng=True, step=HALF, durable=False)
        hook.remove()
        assert not steps and before == (random.getstate(), torch.get_rng_state().tolist())
    return digests


def resume(folder: Path) -> dict[str, Any]:
    digests = {}
    for name, build in configurations().items():
        for way, how in WAYS.items():
            if way and name in FIXED:
                continue
            seed(99)
            run = build(**how)
            steps: list[Any] = []
            hook = register_optimizer_step_pre_hook(lambda *arguments: steps.append(arguments))
            resumed = shardsave.resume(folder / name, run.model, training=run.training, rng=True)
            hook.remove()
            assert not steps and resumed.values.get("epoch", 3) == 3
            for number in range(resumed.next_step, 2 * HALF + 1):
                run.step(number)
            digests[f"{name}, {way}"] = digest(run), resumed.notes
    return digests


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps({"train": train, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))))
