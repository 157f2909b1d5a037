"""Which tensors of a module and of optimizers own memory, and how a save is staged because of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from shardsave._background.guard import inside_step
from shardsave._common.memory import PLAIN_TYPES, tensors_in
from shardsave._common.processes import several_processes

Mode = Literal["ring", "snapshot", "blocking"]

READ = "parameters and optimizer state are read while training goes on"
COPIED = "everything is copied in the call"


class Choice(NamedTuple):
    """How a save is staged. ``reason``: why, a sentence for the report. ``way_out``: what could be done instead, if it is no ring."""

    mode: Mode
    reason: str
    way_out: str = ""


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """``tensor`` if it is a plain one with memory; the plain tensors that it consists of, if it is of a class that is flattened."""
    if type(tensor) in PLAIN_TYPES:
        if tensor.layout is torch.strided and not tensor.is_nested:
            yield tensor
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_parts(getattr(tensor, name))


def memory_of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The plain tensors that a step of ``optimizer`` may change: its parameters and its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from plain_parts(parameter)
    for tensor in tensors_in(dict(optimizer.state)):
        yield from plain_parts(tensor)


def memory_of_module(module: nn.Module) -> Iterator[torch.Tensor]:
    """The plain tensors that the Parameters of ``module`` consist of."""
    for parameter in parameters_of(module):
        yield from plain_parts(parameter)


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """All Parameters, some maybe twice; much faster than `Module.parameters`."""
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                yield parameter


def choose(source: nn.Module | Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer], wanted: str) -> Choice:
    """How ``source`` is staged. Raises ValueError if ``wanted`` is ``"ring"``, and the ring cannot be right."""
    if wanted == "snapshot":
        return Choice("snapshot", f"{COPIED}: staging='snapshot' was requested")
    obstacle = _obstacle(source, optimizers)
    if wanted == "ring":
        if obstacle is not None:
            raise ValueError(f"staging='ring' is not possible: {obstacle.reason}; {obstacle.way_out}; nothing was written")
        return Choice("ring", f"{READ}: staging='ring' was requested")
    if obstacle is None and several_processes():
        obstacle = Choice("snapshot", "several processes train together")
    if obstacle is not None:
        return Choice("snapshot", f"{COPIED}: {obstacle.reason}")
    return Choice(
        "ring",
        f"{READ}: the optimizers in training= own every trainable parameter",
    )


def _obstacle(source: nn.Module | Mapping[str, Any], optimizers: Sequence[torch.optim.Optimizer]) -> Choice | None:
    """Why memory must not be read while training goes on; None if it may."""
    snapshot = "use staging='snapshot', which copies everything in the call"
    if not isinstance(source, nn.Module):
        return Choice("snapshot", "no optimizer is known to own the tensors of a mapping", f"pass the module, or {snapshot}")
    if inside_step():
        return Choice(
            "snapshot", "the call was made inside a step of an optimizer", f"make it between two steps, or {snapshot}"
        )
    owned: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owned.update(map(id, group["params"]))
            if group.get("capturable") and group["params"]:
                kind = type(optimizer).__name__
                return Choice("snapshot", f"{kind} is capturable, and no hook runs when a CUDA graph steps", snapshot)
    if not owned:
        return Choice("snapshot", "training= names no optimizer that owns a parameter", f"pass it in training=, or {snapshot}")
    if any(parameter.requires_grad and id(parameter) not in owned for parameter in parameters_of(source)):
        name = next(name for name, p in source.named_parameters() if p.requires_grad and id(p) not in owned)
        return Choice(
            "snapshot",
            f"no optimizer in training= owns the trainable parameter {name!r}",
            f"pass its optimizer in training=, freeze it, or {snapshot}",
        )
    return None
