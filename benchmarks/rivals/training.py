"""A model with its AdamW, saved and resumed: by shardsave, and by the tools that save an optimizer too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model import Training
from rivals import distributed, shardsave_, torch_checkpointing_, torch_save
from rivals.tool import Tool

_NAME = "training.pt"


def _save(training: Training, path: Path):
    import shardsave

    return shardsave.save(training.model, path, training={"optimizer": training.optimizer}, progress=False, reuse=False)


def _resume(training: Training, path: Path) -> None:
    import shardsave

    shardsave.resume(path, training.model, training={"optimizer": training.optimizer}, progress=False)


def _torch_ready() -> None:
    pass


def _torch_save(training: Training, path: Path) -> None:
    import torch

    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path / _NAME)


def _torch_load(training: Training, path: Path) -> None:
    import torch

    loaded = torch.load(path / _NAME)
    training.model.load_state_dict(loaded["model"])
    training.optimizer.load_state_dict(loaded["optimizer"])


def _dcp_ready() -> None:
    import torch.distributed.checkpoint.state_dict  # noqa: F401

    distributed.dcp_ready()


def _dcp_save(training: Training, path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(training.model, training.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=True)


def _dcp_load(training: Training, path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = get_state_dict(training.model, training.optimizer)  # a step of the optimizer makes its state
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    set_state_dict(training.model, training.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _checkpointing_save(training: Training, path: Path) -> None:
    torch_checkpointing_.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)


def _checkpointing_load(training: Training, path: Path) -> None:
    loaded = torch_checkpointing_.load({"model": training.model.state_dict(), "optimizer": None}, path)
    training.optimizer.load_state_dict(loaded["optimizer"])


def _use_an_optimizer() -> None:
    """The first use of an optimizer imports torch's compiler, which takes longer than the calls that are measured."""
    import torch

    layer = torch.nn.Linear(1, 1)
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1)).sum().backward()
    adam.step()
    adam.load_state_dict(adam.state_dict())


def _of(tools: tuple[Tool, ...], name: str, **changes: Any) -> Tool:
    """The tool of that name, with the ``changes`` that let it save and load a training."""
    tool = replace(next(tool for tool in tools if tool.name == name), mapped=frozenset(), through_map=frozenset(), **changes)
    ready = tool.ready

    def ready_for_trainings() -> None:
        ready()
        _use_an_optimizer()

    return replace(tool, ready=ready_for_trainings)


#: By name, shardsave first. A ``save`` and a way to load are called with a `Training` in the place of a model.
TRAINING = {
    tool.name: tool
    for tool in (
        _of(shardsave_.TOOLS, "shardsave", save=_save, loads={"into": _resume}),
        _of(torch_save.TOOLS, "torch.save, state dict", ready=_torch_ready, save=_torch_save, loads={"into": _torch_load}),
        _of(distributed.TOOLS, "DCP", ready=_dcp_ready, save=_dcp_save, loads={"into": _dcp_load}),
        _of(torch_checkpointing_.TOOLS, "torch_checkpointing", save=_checkpointing_save, loads={"into": _checkpointing_load}),
    )
}
