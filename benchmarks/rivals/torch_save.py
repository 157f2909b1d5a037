"""torch.save and torch.load: a state dict, and the whole module."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rivals.tool import Tool

_NAME = "model.pt"


def _ready() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401  the classes that a whole module's pickle names


def _save(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path / _NAME)


def _into(model: nn.Module, path: Path) -> None:
    model.load_state_dict(torch.load(path / _NAME))


def _into_mapped(model: nn.Module, path: Path) -> None:
    model.load_state_dict(torch.load(path / _NAME, mmap=True))


def _new(path: Path):
    return torch.load(path / _NAME)


def _new_mapped(path: Path):
    return torch.load(path / _NAME, mmap=True)


def _save_module(model: nn.Module, path: Path) -> None:
    torch.save(model, path / _NAME)


def _new_module(path: Path):
    return torch.load(path / _NAME, weights_only=False).state_dict()


TOOLS = (
    Tool(
        name="torch.save, state dict",
        packages=("torch",),
        ready=_ready,
        save=_save,
        loads={"into": _into, "into, mapped": _into_mapped, "new": _new, "new, mapped": _new_mapped},
        durable=False,
        atomic="no: writes over the file",
        checked="nobody",
        mapped=frozenset({"new, mapped"}),
        through_map=frozenset({"into, mapped"}),
    ),
    Tool(
        name="torch.save, whole module",
        compared_with=("shardsave, whole module",),
        packages=("torch",),
        ready=_ready,
        save=_save_module,
        loads={"new": _new_module},
        durable=False,
        atomic="no: writes over the file",
        checked="nobody",
    ),
)
