"""``torch.distributed.checkpoint`` (DCP) on checkpoints of this package: a storage writer and a storage reader.

A checkpoint that DCP saves with `StorageWriter` is one like all others: ``load_model``, ``from_pretrained`` and safetensors read it.
`StorageReader` reads any checkpoint, whoever wrote it, into any mesh.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, Union

import torch.distributed
from torch import nn
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardsave._api.arguments import check_path, check_progress, check_switches, pick
from shardsave._api.rank_timeouts import check_timeouts
from shardsave._api.reports import LoadReport, SaveReport
from shardsave._api.save import How, check_how
from shardsave._common.progress import ProgressArgument
from shardsave.integrations._dcp_model import ModelRecord, record_of
from shardsave.integrations._dcp_names import Rule, find_rule, path_of, refuse_no_weights, rule_for
from shardsave.integrations._dcp_read import Stored, open_stored, read_items
from shardsave.integrations._dcp_write import Noted, Options, Request, write

__all__ = ["StorageReader", "StorageWriter"]

#: Where DCP has a checkpoint: the path of a directory.
PathLike = Union[str, os.PathLike[str]]


class StorageWriter(BlockingAsyncStager, storage.StorageWriter):
    """Writes what ``torch.distributed.checkpoint.save`` or ``async_save`` saves as the checkpoint in ``directory``.

    Everything is committed by one rename, or nothing is. What is no tensor is stored as plain data; values that are not are refused by
    name, since no pickle is ever written.

    Args:
        directory: where the checkpoint goes, unless DCP is called with ``checkpoint_id``. It is created if it does not exist.
        model: the module whose tensors the state dict has. It gives them their flags and ties, and transformers' configs are written
            beside them. Its tensors become the weights, under its own names; everything else becomes a training state. Without it, all
            tensors become weights, under DCP's names, and flags are unknown.
        prefix: what the names of the model's tensors begin with in the state dict, such as ``"model."``; by default it is found out.
        process_group: the group that DCP is called with, if it is called with one.
        max_shard_size, durable, metadata, step, metrics, reuse, recheck_every, progress, lock_timeout, rank_timeout,
            phase_timeout: as in `shardsave.save`.

    After a save, ``report`` is what `shardsave.save` returns; None where the save ran in another process.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        torch.distributed.checkpoint.api.CheckpointException: raised by DCP; it has the errors that `shardsave.save` raises.

    Example:
        >>> import torch, torch.distributed.checkpoint as dcp
        >>> from shardsave.integrations.dcp import StorageReader, StorageWriter
        >>> model = torch.nn.Linear(4, 2)
        >>> metadata = dcp.save(model.state_dict(), storage_writer=StorageWriter("linear", model), no_dist=True)
        >>> dcp.load(model.state_dict(), storage_reader=StorageReader("linear"), no_dist=True)
    """

    def __init__(
        self,
        directory: PathLike,
        model: nn.Module | None = None,
        *,
        prefix: str | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        max_shard_size: Union[int, str] = "2GB",
        durable: bool = True,
        metadata: Mapping[str, Any] | None = None,
        step: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        reuse: Union[PathLike, Literal[False], None] = None,
        recheck_every: int = 10,
        progress: ProgressArgument = None,
        lock_timeout: float = 600.0,
        rank_timeout: float = 120.0,
        phase_timeout: float = 1800.0,
    ) -> None:
        BlockingAsyncStager.__init__(self)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module or None, not {type(model).__name__}")
        _check_prefix(prefix)
        self._how = pick(How, locals())
        check_how(directory, self._how)
        self._options = Options(max_shard_size, metadata, step, metrics)
        self._options.check()
        self._directory = os.fspath(directory)
        self._model = model
        self._prefix = prefix
        self._process_group = process_group
        self._staged: ModelRecord | None = None  # of the moment at which `async_save` was called
        self._record: ModelRecord | None = None
        self._order: Mapping[str, int] = {}
        self.report: SaveReport | None = None

    @property
    def checkpoint_id(self) -> str:
        """The directory."""
        return self._directory

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called by ``async_save``: copies ``state_dict`` to the CPU, and notes the flags of the model as they are now."""
        self._staged = self._model_now()
        return super().stage(state_dict)

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        if checkpoint_id is not None:
            check_how(checkpoint_id, self._how)
            self._directory = os.fspath(checkpoint_id)
        self.report = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives must be True: without collectives every rank would write a checkpoint of its own")
        self._record = self._staged if self._staged is not None else self._model_now()
        self._staged = None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._directory)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        paths = {
            item.index.fqn: path_of(item.index.fqn, plan.planner_data) for item in plan.items if item.tensor_data is not None
        }
        if self._prefix is not None:
            rule = rule_for(self._prefix, paths)
        else:
            rule = find_rule(self._record, paths) if self._record is not None else Rule()
        self._order = {name: number for number, name in enumerate(dict.fromkeys(item.index.fqn for item in plan.items))}
        return dataclasses.replace(plan, storage_data=Noted(rule, 0))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        noted = [plan.storage_data for plan in plans if plan.usable]
        if noted and all(isinstance(note, Noted) and note.rule is None for note in noted):
            refuse_no_weights(self._prefix, self._record, [item.index.fqn for plan in plans for item in plan.items])
        return [_counted(plan, len(plans)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        noted = plan.storage_data
        if not isinstance(noted, Noted):
            raise ValueError(
                f"cannot save {self._directory}: a planner that keeps the plans of its storage writer was expected, "
                f"{type(planner).__name__} has removed storage_data; nothing was written"
            )
        request = Request(plan, planner, noted, self._record, self._order, self._options)
        self.report = write(request, self._directory, self._how, self._process_group)
        written: Future[list[WriteResult]] = Future()
        written.set_result([WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Everything was committed when the last rank had written."""
        metadata.storage_meta = self.storage_meta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        return _is_local(checkpoint_id)

    def _model_now(self) -> ModelRecord | None:
        return record_of(self._model) if self._model is not None else None

    def __getstate__(self) -> dict[str, Any]:
        """For ``async_save`` in another process, which needs neither the model nor a group of this one."""
        progress = self._how.progress if isinstance(self._how.progress, bool) else None
        return {
            **vars(self),
            "_staged": self._staged if self._staged is not None else self._model_now(),
            "_how": self._how._replace(progress=progress),
            "_model": None,
            "_process_group": None,
        }


class StorageReader(storage.StorageReader):
    """Reads any checkpoint that `shardsave.load` reads, for ``torch.distributed.checkpoint.load``, into any mesh.

    The ranks read each byte that they need once, verify it, and give it to each other. A rank that loads alone, or in a group that
    ``process_group`` does not name, reads the ranges of the files that its boxes need; what is read in part is then not verified.
    Tensors are cast to the dtype of those that they are read into.

    Args:
        directory: the checkpoint, unless DCP is called with ``checkpoint_id``: a directory, an index or one safetensors file.
        prefix: what the state dict has before the names of the weights, such as ``"model."`` for ``{"model": model.state_dict()}``; by
            default what DCP had there when it saved the checkpoint, and nothing if something else saved it.
        process_group: the group that DCP is called with, if it is called with one.
        verify, progress: as in `shardsave.load`. rank_timeout, phase_timeout: as in `shardsave.load_model`.

    After a load, ``report`` tells what was read on this rank.
    """

    def __init__(
        self,
        directory: PathLike,
        *,
        prefix: str | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        verify: bool = True,
        progress: ProgressArgument = None,
        rank_timeout: float = 120.0,
        phase_timeout: float = 1800.0,
    ) -> None:
        check_path(directory)
        _check_prefix(prefix)
        check_switches(verify=verify)
        check_progress(progress)
        check_timeouts(rank_timeout, phase_timeout)
        self._process_group = process_group
        self._timeouts = rank_timeout, phase_timeout
        self._directory = os.fspath(directory)
        self._prefix = prefix
        self._verify = verify
        self._progress = progress
        self._stored: Stored | None = None
        self.report: LoadReport | None = None

    @property
    def checkpoint_id(self) -> str:
        """The path of the checkpoint."""
        return self._directory

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        if checkpoint_id is not None:
            check_path(checkpoint_id)
            self._directory = os.fspath(checkpoint_id)
        self._close()
        self.report = None

    def read_metadata(self) -> Metadata:
        """What the checkpoint has. Its files stay open until they have been read, so that a save cannot replace them in between.

        It takes no ``kwargs``: with these, DCP would try again after an error, and go on without the other ranks.
        """
        self._close()
        self._stored = open_stored(self._directory, self._prefix)
        return self._stored.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return [dataclasses.replace(plan, storage_data=len(plans)) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self._stored is None:
            self.read_metadata()
        assert self._stored is not None
        try:
            self.report = read_items(
                self._stored,
                plan,
                planner,
                verify=self._verify,
                progress=self._progress,
                group=self._group_of(plan.storage_data),
                timeouts=self._timeouts,
            )
        finally:
            self._close()
        read: Future[None] = Future()
        read.set_result(None)
        return read

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        return _is_local(checkpoint_id)

    def _group_of(self, ranks: Any) -> torch.distributed.ProcessGroup | None:
        """The group of the ``ranks`` that DCP loads on; None if this rank is alone, or nobody told which ones the others are."""
        if not isinstance(ranks, int) or ranks < 2:
            return None
        group = self._process_group if self._process_group is not None else torch.distributed.group.WORLD
        return group if group is not None and group.size() == ranks else None

    def _close(self) -> None:
        if self._stored is not None:
            self._stored.checkpoint.close()
            self._stored = None


def _counted(plan: SavePlan, ranks: int) -> SavePlan:
    """``plan`` of one of ``ranks``. One that is not usable says that the one before it holds, with what was noted then."""
    rule = plan.storage_data.rule if isinstance(plan.storage_data, Noted) else None
    return dataclasses.replace(plan, storage_data=Noted(rule, ranks)) if plan.usable else plan


def _check_prefix(prefix: object) -> None:
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string or None, not {type(prefix).__name__}")


def _is_local(checkpoint_id: PathLike) -> bool:
    return "://" not in os.fspath(checkpoint_id)
