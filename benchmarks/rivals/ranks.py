"""The ways in which several ranks save and load one sharded model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from rivals import distributed, shardsave_

_CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class RankTool:
    """A tool, and how all ranks call it together.

    ``ready()`` imports what the tool needs. ``save(model, directory, shard_bytes)`` saves; files have at most ``shard_bytes``, if the tool
    has that choice. ``load(model, directory)`` fills the model. ``files``: who reads what is written. ``durable``: whether a finished save
    survives a loss of power (read from the tool's sources). ``sent()``: the bytes that this rank has passed to others through shared
    memory so far; what goes through sockets is counted by the kernel.
    """

    name: str
    packages: tuple[str, ...]
    ready: Callable[[], object]
    save: Callable[[nn.Module, Path, int], object]
    load: Callable[[nn.Module, Path], object]
    files: str
    durable: bool
    sent: Callable[[], int] = lambda: 0


#: The exchanges of this process, by identity → the bytes that they have passed to other ranks.
_passed: dict[int, int] = {}


def _imports() -> None:
    """Imports what shardsave imports when it is first called on several ranks."""
    shardsave_.TOOLS[0].ready()
    import shardsave._ranks.load_job
    import shardsave._ranks.save_job  # noqa: F401


def _ready() -> None:
    _imports()
    from shardsave._ranks.exchange import Exchange

    close = Exchange.close

    def close_and_count(exchange: Exchange) -> None:
        _passed[id(exchange)] = exchange.sent_bytes
        close(exchange)

    Exchange.close = close_and_count


def _sent() -> int:
    return sum(_passed.values())


def _save(model: nn.Module, path: Path, shard_bytes: int) -> object:
    import shardsave

    return shardsave.save(model, path, max_shard_size=shard_bytes, progress=False, reuse=False)


def _load(model: nn.Module, path: Path) -> object:
    import shardsave

    return shardsave.load_model(model, path, progress=False)


def _gloo_ready() -> None:
    """Makes each rank a host of its own, so that everything goes over gloo."""
    _imports()
    from shardsave._ranks import group

    of_machine = group.this_host
    group.this_host = lambda: of_machine()._replace(key=f"process-{os.getpid()}")


def _dcp_ready() -> None:
    distributed.dcp_ready()
    import torch.distributed.checkpoint.hf_storage
    import torch.distributed.checkpoint.state_dict  # noqa: F401


def _dcp_save(model: nn.Module, path: Path, shard_bytes: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id=path / _CHECKPOINT)


def _dcp_load(model: nn.Module, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load({"model": model.state_dict()}, checkpoint_id=path / _CHECKPOINT)  # the state dict's tensors are the model's own


def _hugging_face_save(model: nn.Module, path: Path, shard_bytes: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    state = model.state_dict()
    writer = HuggingFaceStorageWriter(
        str(path),
        fqn_to_index_mapping=_files(state, shard_bytes),
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=dist.get_world_size(),
    )
    dcp.save(state, storage_writer=writer)


def _files(state: dict[str, Any], shard_bytes: int) -> dict[str, int]:
    """The number of the file for each tensor, so that each file has at most ``shard_bytes``, or one tensor."""
    files: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if filled and filled + nbytes > shard_bytes:
            number, filled = number + 1, 0
        files[name] = number
        filled += nbytes
    return files


def _hugging_face_load(model: nn.Module, path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    dcp.load(model.state_dict(), storage_reader=HuggingFaceStorageReader(str(path)))


def _full_save(model: nn.Module, path: Path, shard_bytes: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    import shardsave

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        shardsave.save(state, path, max_shard_size=shard_bytes, progress=False, reuse=False)
    dist.barrier()


def _full_load(model: nn.Module, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    import shardsave

    state = shardsave.load(path, progress=False) if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _checkpointing_ready() -> None:
    from torch_checkpointing import default_resharder  # noqa: F401
    from torch_checkpointing.metadata_manager import DefaultMetadataManager

    # Version 0.1.1 gathers the description of what it saves, which a load on other ranks needs, through CUDA tensors only.
    DefaultMetadataManager._all_gather_pickled_data = _gathered


def _gathered(_manager: object, data: Any, process_group: dist.ProcessGroup | None = None) -> dict[int, Any]:
    everywhere: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everywhere, data, group=process_group)
    return dict(enumerate(everywhere))


def _manager() -> Any:
    from torch_checkpointing import CheckpointManager, ItemSpec
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    # With direct I/O, its default, version 0.1.1 writes lengths that are not aligned: EINVAL on ext4.
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    items = {"model": ItemSpec(resharder=DefaultResharder())}
    return CheckpointManager(CheckpointManager.Config(items=items, save=SyncCheckpointSaverConfig(), storage_config=storage))


def _checkpointing_save(model: nn.Module, path: Path, shard_bytes: int) -> None:
    manager = _manager()
    manager.save(str(path / _CHECKPOINT), {"model": model.state_dict()})
    manager.close()


def _checkpointing_load(model: nn.Module, path: Path) -> None:
    manager = _manager()
    manager.load(str(path / _CHECKPOINT), into={"model": model.state_dict()})
    manager.close()


_OWN, _PLAIN = "its own readers", "any reader of safetensors"

GLOO = "shardsave, over gloo alone"
DCP = "DCP, .distcp"

#: Our own tools, the faster one first.
OURS = ("shardsave", GLOO)

#: Every tool by name, shardsave first.
RANKS = {
    tool.name: tool
    for tool in (
        RankTool("shardsave", ("shardsave",), _ready, _save, _load, _PLAIN, True, _sent),
        RankTool(GLOO, ("shardsave",), _gloo_ready, _save, _load, _PLAIN, True),
        RankTool(DCP, ("torch",), _dcp_ready, _dcp_save, _dcp_load, _OWN, True),
        RankTool(
            "DCP, Hugging Face, consolidated", ("torch",), _dcp_ready, _hugging_face_save, _hugging_face_load, _PLAIN, False
        ),
        RankTool("full state dict on rank 0, shardsave", ("shardsave",), _dcp_ready, _full_save, _full_load, _PLAIN, True),
        RankTool(
            "torch_checkpointing",
            ("torch_checkpointing",),
            _checkpointing_ready,
            _checkpointing_save,
            _checkpointing_load,
            _OWN,
            False,
        ),
    )
}
