"""Trainings on any number of ranks: how a model is sharded, its optimizers, and what else there is to save.

Each function of `TRAININGS` builds one on the ranks of the default group. `WHOLE` has the same for one process without any sharding.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardsave


class Training(NamedTuple):
    """``state``: for ``training=``. ``group``: for ``process_group=``."""

    model: nn.Module
    state: dict[str, Any]
    group: Any = None

    def step(self) -> None:
        loss = self.model(self.state["loader"].value.batch().to(next(self.model.parameters()).dtype)).float().pow(2).mean()
        loss.backward()
        for name in ("optimizer", "other"):
            if name in self.state:
                self.state[name].step()
                self.state[name].zero_grad()
        if "scheduler" in self.state:
            self.state["scheduler"].step()
        self._average()
        self.state["epoch"] += 1

    def _average(self) -> None:
        ema = self.state.get("ema")
        if isinstance(ema, AveragedModel):
            ema.update_parameters(self.model)
        elif ema is not None:
            averages = dict(ema.named_parameters()) if isinstance(ema, nn.Module) else ema
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    averages[name].mul_(0.9).add_(parameter, alpha=0.1)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def save(self, folder: Any, **options: Any) -> shardsave.SaveReport:
        return shardsave.save(
            self.model,
            folder,
            training=self.state,
            rng=True,
            step=self.state["epoch"],
            process_group=self.group,
            durable=False,
            **options,
        )

    def resume(self, folder: Any, **options: Any) -> shardsave.Resumed:
        resumed = shardsave.resume(
            folder, self.model, training=self.state, **{"rng": True, "process_group": self.group, **options}
        )
        self.state["epoch"] = resumed.values["epoch"]
        return resumed

    def everything(self) -> Iterator[tuple[str, Any]]:
        """Every tensor and every other value, by name; nothing that belongs to a rank."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        yield "flags", [parameter.requires_grad for parameter in self.model.parameters()]
        ema = self.state.get("ema", {})
        averages = ema.state_dict() if isinstance(ema, nn.Module) else ema
        yield from ((f"ema {name}", value) for name, value in averages.items())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer in (self.state.get("optimizer"), self.state.get("other")):
            for parameter, state in optimizer.state.items() if optimizer is not None else ():
                for key, value in state.items():
                    for at, item in enumerate(value if isinstance(value, list) else [value]):
                        yield f"state of {names[id(parameter)]}, {key} {at}", item
            if optimizer is not None:
                options = [sorted({**group, "params": None}.items()) for group in optimizer.param_groups]
                yield f"options of {type(optimizer).__name__}", options
        yield "scheduler", sorted(self.state["scheduler"].state_dict().items()) if "scheduler" in self.state else None
        yield "epoch", self.state["epoch"]

    def digest(self) -> str:
        """Of everything that this rank has, bit for bit, with what belongs to it alone."""
        found = [(name, _bits(value)) for name, value in sorted(self.everything(), key=lambda pair: pair[0])]
        own = self.state["loader"].value.state_dict(), torch.get_rng_state().tolist(), random.getstate()
        return hashlib.sha256(repr((found, own, np.random.get_state(legacy=False))).encode()).hexdigest()

    def whole(self) -> dict[str, Any]:
        """`everything`, with whole tensors."""
        with torch.no_grad():
            return {
                name: value.full_tensor().clone()
                if isinstance(value, DTensor)
                else value.clone()
                if torch.is_tensor(value)
                else value
                for name, value in self.everything()
            }


def _bits(value: Any) -> str:
    value = value.to_local() if isinstance(value, DTensor) else value
    if not torch.is_tensor(value):
        return repr(value)
    return repr((value.dtype, value.shape, value.detach().reshape(-1).view(torch.uint8).tolist()))


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The names of what is not the same bit for bit in what two `Training.whole` returned."""

    def same(a: Any, b: Any) -> bool:
        if torch.is_tensor(a) and torch.is_tensor(b):
            return a.dtype == b.dtype and torch.equal(a, b)
        return bool(repr(a) == repr(b))

    return [name for name in {**left, **right} if not (name in left and name in right and same(left[name], right[name]))]


class Loader:
    """Draws batches, another sequence on each rank."""

    def __init__(self, rank: int, width: int) -> None:
        self.generator = np.random.default_rng(rank)
        self.batches = 0
        self.width = width

    def batch(self) -> torch.Tensor:
        self.batches += 1
        return torch.from_numpy(self.generator.random((2, self.width), dtype=np.float32))

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "generator": self.generator.bit_generator.state, "drawn": np.arange(self.batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.generator.bit_generator.state = state["batches"], state["generator"]


class Net(nn.Module):
    """Fewer rows than four ranks, dropout, something frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        self.up.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.drop(self.up(x)).relu())) * self.scale


class MasterAdam(torch.optim.Optimizer):
    """Keeps its state and a copy of the parameters in float32, whatever their dtype; also text, a number, and one tensor twice."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                average = torch.zeros_like(p, dtype=torch.float32)
                state.update(master=p.float(), average=[average, average], note="text", count=0)
            state["count"] += 1
            if p.dim() > 1:
                state["rows"] = p.grad.float().abs().mean(-1)  # distributed, in another shape than the parameter
            state["average"][0].lerp_(p.grad.float(), 0.1)
            state["master"].sub_(state["average"][1], alpha=self.param_groups[0]["lr"])
            p.copy_(state["master"])


def net(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "lr": 3e-2},
    ]


def finished(model: nn.Module, state: dict[str, Any], group: Any = None, rank: int | None = None) -> Training:
    rank = dist.get_rank() if rank is None else rank
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(100 + rank)
    return Training(model, {**state, "loader": shardsave.PerRank(Loader(rank, 8)), "epoch": 0}, group)


def adamw(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"optimizer": optimizer, "scheduler": scheduler, "ema": ema}


def sharded(model: Net, **options: Any) -> Net:
    for part in (model.up, model.down, model.head, model):
        fully_shard(part, **options)
    return model


def rows(seed: int) -> Training:
    model = sharded(net(seed))
    return finished(model, adamw(model))


def columns(seed: int) -> Training:
    model = sharded(net(seed), shard_placement_fn=lambda p: Shard(1 if p.dim() == 2 and p.shape[1] % 4 == 0 else 0))
    return finished(model, {"optimizer": torch.optim.SGD(groups(model), lr=1e-2, momentum=0.9, nesterov=True)})


def masters(seed: int) -> Training:
    model = sharded(net(seed, torch.bfloat16))
    return finished(model, {"optimizer": MasterAdam([p for p in model.parameters() if p.requires_grad], 1e-2)})


def hybrid(seed: int) -> Training:
    """Two replicas of shards; two optimizers, and an averaged module that is sharded too."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2 if size > 1 else 1, max(size // 2, 1)), mesh_dim_names=("replicas", "shards"))
    model, ema = sharded(net(seed), mesh=mesh), sharded(net(seed), mesh=mesh)
    matrices, others = (group["params"] for group in groups(model))
    other = torch.optim.AdamW(others, amsgrad=True)
    return finished(model, {"optimizer": torch.optim.Muon(matrices, lr=1e-2), "other": other, "ema": ema})


def tensor_parallel(seed: int) -> Training:
    """Some parameters are distributed, the others are the same on all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(net(seed), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.up.bias.requires_grad_(False)
    training = finished(model, {"optimizer": torch.optim.AdamW(groups(model), lr=1e-2, foreach=False)})
    model.register_forward_pre_hook(lambda module, inputs: (_broadcast(inputs[0]),))
    return training


def data_parallel(seed: int) -> Training:
    """Plain tensors, which are the same on all ranks."""
    model = net(seed)
    model.drop.p = 0.0
    training = finished(
        model,
        {
            "optimizer": torch.optim.AdamW(groups(model), lr=1e-2),
            "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        },
        dist.group.WORLD,
    )
    model.register_forward_pre_hook(lambda module, inputs: (_broadcast(inputs[0]),))
    return training


def _broadcast(x: torch.Tensor) -> torch.Tensor:
    """That of the first rank."""
    dist.broadcast(x, 0)
    return x


TRAININGS: dict[str, Callable[[int], Training]] = {
    "rows": rows,
    "columns": columns,
    "masters": masters,
    "hybrid": hybrid,
    "tensor_parallel": tensor_parallel,
    "data_parallel": data_parallel,
}


def whole_rows(seed: int) -> Training:
    model = net(seed)
    return finished(model, adamw(model), rank=0)


def whole_masters(seed: int) -> Training:
    model = net(seed, torch.bfloat16)
    return finished(model, {"optimizer": MasterAdam([p for p in model.parameters() if p.requires_grad], 1e-2)}, rank=0)


def whole_hybrid(seed: int) -> Training:
    model = net(seed)
    matrices, others = (group["params"] for group in groups(model))
    optimizer, other = torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(others, amsgrad=True)
    return finished(model, {"optimizer": optimizer, "other": other, "ema": net(seed)}, rank=0)


WHOLE: dict[str, Callable[[int], Training]] = {"rows": whole_rows, "masters": whole_masters, "hybrid": whole_hybrid}
