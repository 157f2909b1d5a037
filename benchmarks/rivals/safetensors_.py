"""save_file, load_model and load_file of safetensors; also load_file and then a copy of every tensor, so that the data is in memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rivals.tool import Tool

_NAME = "model.safetensors"


def _ready() -> None:
    import safetensors.torch  # noqa: F401


def _save(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path / _NAME, metadata={"format": "pt"})


def _into(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_model

    load_model(model, path / _NAME)


def _new_mapped(path: Path):
    from safetensors.torch import load_file

    return load_file(path / _NAME)


def _new(path: Path):
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path / _NAME).items()}


TOOLS = (
    Tool(
        name="safetensors",
        compared_with=("shardsave", "shardsave, durable=False"),
        packages=("safetensors",),
        ready=_ready,
        save=_save,
        loads={"into": _into, "new": _new, "new, mapped": _new_mapped},
        durable=False,
        atomic="no: writes over the file",
        checked="nobody",
        mapped=frozenset({"new, mapped"}),
        through_map=frozenset({"into", "new"}),
    ),
)
