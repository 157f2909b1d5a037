"""The ways to save while a training goes on. Each keeps between saves what its documentation advises: memory, a process, a manager."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import measure
from model import LiveTraining, Training
from rivals.training import TRAINING


class Saver:
    """Saves one training again and again. This class saves nothing: its loop shows how exact the measurement is.

    ``durable``: whether a finished save survives a loss of power (read from the tool's sources). ``memory``: what it keeps between saves.
    ``stages_later``, ``finishes_later``: whether `start` returns before every byte has left the training's memory, or before the end.
    """

    durable = True
    memory = ""
    stages_later = False
    finishes_later = True

    def __init__(self, training: LiveTraining) -> None:
        self._training = training

    def start(self, path: Path) -> Any:
        """Saves to the empty directory ``path``, or begins to. The other methods get the result as ``pending``."""

    def wait(self, pending: Any) -> Any:
        """Waits until the save is finished. Returns shardsave's report, if there is one; raises the error of a failed save."""

    def wait_staged(self, pending: Any) -> None:
        """Waits until every byte has left the training's memory, if ``stages_later``."""

    def guard(self) -> AbstractContextManager[Any]:
        """What the training loop must hold during each step of the optimizer."""
        return nullcontext()

    def load(self, into: Training, path: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads and processes that were kept between saves."""


class Blocking(Saver):
    """``shardsave.save``: the training stands still until the checkpoint is durable."""

    finishes_later = False

    def __init__(self, training: LiveTraining) -> None:
        super().__init__(training)
        TRAINING["shardsave"].ready()

    def start(self, path: Path) -> Any:
        import shardsave

        return shardsave.save(self._training.model, path, training={"optimizer": self._training.optimizer}, progress=False)

    def wait(self, pending: Any) -> Any:
        return pending

    def load(self, into: Training, path: Path) -> None:
        TRAINING["shardsave"].loads["into"](into, path)


class Asynchronous(Blocking):
    """``shardsave.save_async`` in one of its staging modes."""

    finishes_later = True

    def __init__(self, training: LiveTraining, staging: str) -> None:
        super().__init__(training)
        self._staging = staging
        self.stages_later = staging == "ring"
        self.memory = {"snapshot": "the snapshot", "ring": "the ring"}[staging]

    def start(self, path: Path) -> Any:
        import shardsave

        parts = {"optimizer": self._training.optimizer}
        return shardsave.save_async(self._training.model, path, training=parts, staging=self._staging, progress=False)

    def wait(self, pending: Any) -> Any:
        return pending.wait()

    def wait_staged(self, pending: Any) -> None:
        pending.staged.wait()


class TorchSave(Saver):
    """The usual recipe: a copy in memory that is used again, then ``torch.save`` and fsync on a thread."""

    memory = "the copy"

    def __init__(self, training: LiveTraining) -> None:
        super().__init__(training)
        self._copy: Any = None
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(int).result()  # starts the thread

    def start(self, path: Path) -> Future[None]:
        self._copy = _copied(_state(self._training), self._copy)
        return self._thread.submit(self._write, path)

    def _write(self, path: Path) -> None:
        torch.save(self._copy, path / "training.pt")
        measure.sync_files(path)

    def wait(self, pending: Future[None]) -> None:
        pending.result()

    def load(self, into: Training, path: Path) -> None:
        TRAINING["torch.save, state dict"].loads["into"](into, path)

    def close(self) -> None:
        self._thread.shutdown()


def _state(training: Training) -> dict[str, Any]:
    return {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}


def _copied(value: Any, kept: Any) -> Any:
    """``value`` with copies of its tensors on the CPU: in the memory of ``kept``, an earlier copy, or in new memory if that is None."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda) if kept is None else kept
        return copy.copy_(value.detach())
    if isinstance(value, dict):
        return {key: _copied(item, None if kept is None else kept[key]) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, None if kept is None else kept[index]) for index, item in enumerate(value)]
    return value


class Dcp(Saver):
    """``async_save`` of torch.distributed.checkpoint. Its stager is kept, because the default one takes new memory for each save."""

    memory = "the stager's copy"

    def __init__(self, training: LiveTraining, *, process: bool) -> None:
        """``process``: a second process writes, which gets the copy through shared memory; otherwise a thread."""
        super().__init__(training)
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        TRAINING["DCP"].ready()
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        pinned = training.device == "cuda"
        self._stager = DefaultStager(StagingOptions(pinned, process, False, pinned))
        self._type = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD

    def start(self, path: Path) -> Any:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self._training.model, self._training.optimizer)
        state = {"model": model, "optimizer": optimizer}
        return dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=self._type, async_stager=self._stager)

    def wait(self, pending: Any) -> None:
        pending.result()

    def load(self, into: Training, path: Path) -> None:
        TRAINING["DCP"].loads["into"](into, path)

    def close(self) -> None:
        import torch.distributed as dist

        self._stager.close()
        dist.destroy_process_group()


class TorchCheckpointing(Saver):
    """torch_checkpointing: a thread copies to shared memory, while the training must not change it; a second process writes."""

    durable = False
    memory = "the copy in shared memory"

    def __init__(self, training: LiveTraining) -> None:
        super().__init__(training)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # With direct I/O, its default, version 0.1.1 writes lengths that are not aligned: EINVAL on ext4.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def start(self, path: Path) -> Any:
        return self._manager.save(str(path / "checkpoint"), _state(self._training))

    def wait(self, pending: Any) -> None:
        pending.result()

    def guard(self) -> AbstractContextManager[Any]:
        return self._manager.lock()

    def load(self, into: Training, path: Path) -> None:
        TRAINING["torch_checkpointing"].loads["into"](into, path)

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(Saver):
    """``Snapshot.async_take``: the call copies everything to new memory."""

    durable = False

    def __init__(self, training: LiveTraining) -> None:
        super().__init__(training)
        import torch.distributed as dist
        import torchsnapshot  # noqa: F401

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def start(self, path: Path) -> Any:
        from torchsnapshot import Snapshot

        return Snapshot.async_take(str(path / "snapshot"), self._stateful(self._training))

    def wait(self, pending: Any) -> None:
        pending.wait()

    def load(self, into: Training, path: Path) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(path / "snapshot")).restore(self._stateful(into))

    def _stateful(self, training: Training) -> dict[str, Any]:
        return {"model": training.model, "optimizer": training.optimizer}

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


NO_SAVE, SNAPSHOT, RING = "no save", "shardsave, snapshot", "shardsave, ring"
DCP_THREAD, DCP_PROCESS, CHECKPOINTING = "DCP async_save, thread", "DCP async_save, process", "torch_checkpointing"

#: Each way that is measured, by name.
WAYS: dict[str, Callable[[LiveTraining], Saver]] = {
    NO_SAVE: Saver,
    "shardsave, blocking": Blocking,
    SNAPSHOT: partial(Asynchronous, staging="snapshot"),
    RING: partial(Asynchronous, staging="ring"),
    "torch.save on a thread": TorchSave,
    DCP_THREAD: partial(Dcp, process=False),
    DCP_PROCESS: partial(Dcp, process=True),
    CHECKPOINTING: TorchCheckpointing,
    "torchsnapshot async_take": TorchSnapshot,
}
