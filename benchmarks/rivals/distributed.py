"""torch.distributed.checkpoint and torchsnapshot, each in a single process."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rivals.tool import Tool


def dcp_ready() -> None:
    import torch.distributed.checkpoint  # noqa: F401


def _dcp_save(model: nn.Module, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)


def _dcp_into(model: nn.Module, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state["model"])


def _snapshot_ready() -> None:
    import torchsnapshot  # noqa: F401


def _snapshot_save(model: nn.Module, path: Path) -> None:
    from torchsnapshot import Snapshot

    Snapshot.take(str(path / "snapshot"), {"model": model})


def _snapshot_into(model: nn.Module, path: Path) -> None:
    from torchsnapshot import Snapshot

    Snapshot(str(path / "snapshot")).restore({"model": model})


TOOLS = (
    Tool(
        name="DCP",
        packages=("torch",),
        ready=dcp_ready,
        save=_dcp_save,
        loads={"into": _dcp_into},
        durable=True,
        atomic="no: writes over the files",
        checked="nobody",
    ),
    Tool(
        name="torchsnapshot",
        packages=("torchsnapshot",),
        ready=_snapshot_ready,
        save=_snapshot_save,
        loads={"into": _snapshot_into},
        durable=False,
        atomic="no: writes over the files",
        checked="nobody",
    ),
)
