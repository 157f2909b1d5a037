"""torch_checkpointing, which torchtitan uses: its synchronous saver, in a single process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rivals.tool import Tool

_NAME = "checkpoint"


def _ready() -> None:
    import torch_checkpointing  # noqa: F401


def _manager():
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    # With direct I/O, its default, version 0.1.1 writes lengths that are not aligned: EINVAL on ext4.
    return CheckpointManager(
        replace(CheckpointManager.Config.with_sync_save(), storage_config=LocalFileSystemStorageConfig(use_direct_io=False))
    )


def save(state: dict[str, Any], path: Path) -> None:
    # It refuses a path that exists, and asks its caller to delete that first.
    shutil.rmtree(path / _NAME, ignore_errors=True)
    manager = _manager()
    manager.save(str(path / _NAME), state)
    manager.close()


def load(into: dict[str, Any], path: Path) -> Any:
    manager = _manager()
    loaded = manager.load(str(path / _NAME), into=into)
    manager.close()
    return loaded


def _save(model: nn.Module, path: Path) -> None:
    save({"model": model.state_dict()}, path)


def _into(model: nn.Module, path: Path) -> None:
    load({"model": model.state_dict()}, path)


def _new(path: Path):
    return load({"model": None}, path)["model"]


TOOLS = (
    Tool(
        name="torch_checkpointing",
        packages=("torch_checkpointing",),
        ready=_ready,
        save=_save,
        loads={"into": _into, "new": _new},
        durable=False,
        atomic="no: the old files must be deleted first",
        checked="nobody",
    ),
)
