"""`load` and `load_model`: from a checkpoint to new tensors, or into a live module."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.load_jobs import job_of_load
from shardsave._api.load_reports import LoadClock, log_load
from shardsave._api.model_load import ModelLoad, check_part, needed_files
from shardsave._api.operators import check_operators
from shardsave._api.reports import LoadReport
from shardsave._common.log_records import somebody_listens
from shardsave._common.memory_errors import check_free_memory
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._loading.job import opened
from shardsave._loading.mapped import Maps
from shardsave._loading.new_tensors import new_tensors
from shardsave._loading.read import TensorReader
from shardsave._loading.selection import check_names, choose, selection
from shardsave._storage.open_checkpoint import open_checkpoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@uncompiled
@verb()
def load(
    path: str | os.PathLike[str],
    *,
    device: Device = None,
    names: Iterable[str] | None = None,
    prefix: str = "",
    verify: bool = True,
    mmap: bool = False,
    progress: ProgressArgument = None,
) -> dict[str, torch.Tensor]:
    """Loads tensors by name from a directory, an index or one safetensors file, whoever wrote it.

    Tied names share one storage, in third-party files only if their metadata records the tie. Only the bytes of the selected tensors are
    read, straight to ``device``. In a directory of files from several ranks (``HuggingFaceStorageWriter``), their chunks are joined; a
    warning says that their whole shapes are inferred.

    Never collective: a rank that calls it waits for no other.

    Args:
        path: the checkpoint.
        device: where the tensors go; the CPU by default.
        names: only these names, written as in the checkpoint; each begins with ``prefix``.
        prefix: only names that begin with it (``"layer2."``); it is removed from the names in the result.
        verify: compare the checksum of every tensor read with the stored one, if there is one.
        mmap: map the files instead of reading them (CPU only): this returns at once, and verifies nothing. Writes into the tensors do
            not reach the files. Only unaligned tensors of third-party files are copied.
        progress: as in ``save``.

    Returns:
        A new dict from names to tensors with the dtype and shape that were saved; none requires grad.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError.
        OutOfMemoryError: the tensors do not fit in memory; nothing was loaded.
        IncompatibleCheckpointError: the checkpoint does not have one of ``names``, or no name begins with ``prefix``.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"a.x": torch.arange(3), "b": torch.ones(2)}, "two-tensors")
        >>> shardsave.load("two-tensors", prefix="a.")
        {'x': tensor([0, 1, 2])}
    """
    check_switches(verify=verify, mmap=mmap)
    check_progress(progress)
    check_path(path)
    check_operators("load", path, "nothing was loaded")
    wanted = check_names(names, prefix)
    target_device = check_device(device) or torch.device("cpu")
    if mmap and target_device.type != "cpu":
        raise ValueError(f"mmap=True returns tensors on the CPU, device {target_device} was asked for")
    clock, reader = LoadClock(), None
    with open_checkpoint(path, selection(wanted, prefix)) as checkpoint:
        for note in (notes := checkpoint.shape_notes):
            warn_caller(note)
        chosen = choose(checkpoint, wanted, prefix)
        located = {stored_name: checkpoint.tensors[stored_name] for stored_name in chosen.values()}
        if mmap:
            tensors = Maps(checkpoint).tensors(located)
        else:
            if target_device.type == "cpu":
                needed = sum(t.nbytes for t in located.values())
                notes = (*notes, *check_free_memory(checkpoint.path, needed, "nothing was loaded"))
            tensors = new_tensors(located, target_device)
            clock.planned()
            with Progress(progress, "loading", sum(t.nbytes for t in located.values())) as reporter:
                reader = TensorReader(checkpoint, verify=verify, progress=reporter)
                reader.read([*zip(located.values(), tensors.values())])
            clock.transferred()
        if somebody_listens():
            log_load(clock.report(path, located.values(), reader, notes), notes)
        return {name.removeprefix(prefix): tensors[stored_name] for name, stored_name in chosen.items()}


@uncompiled
@verb()
def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: Device = None,
    prefix: str = "",
    part: str | None = None,
    strict: bool = True,
    restore_frozen: bool = True,
    verify: bool = True,
    process_group: ProcessGroup | None = None,
    rank_timeout: float = 120.0,
    phase_timeout: float = 1800.0,
    progress: ProgressArgument = None,
) -> LoadReport:
    """Fills ``model`` in place from a checkpoint, and restores the ``requires_grad`` of its parameters.

    ``Parameter`` objects keep their identity, so an optimizer that holds them stays valid; those on the meta device are replaced, as
    ``load_state_dict(assign=True)`` does. There is never a second copy of the model. Values are cast to the module's dtypes, as
    ``load_state_dict`` does. Everything that can be refused is refused before a tensor is changed. Sub-modules that override loading
    (hooks, overrides, extra state) receive a state dict of everything below their prefix, one at a time, before other tensors are
    filled; at that point, only they can still refuse. Extra state that is not a tensor comes from the architecture, if one was saved
    and the state is plain data.

    Args:
        model: a module or sub-module, with or without wrappers (``torch.compile``, DDP, DataParallel).
        path: as in ``load``.
        device: move every tensor there; None leaves each on its device. Meta tensors get memory there, or on the CPU; those of a module
            with DTensors where their ranks compute.
        prefix: load only names that begin with it, and remove it from them: to load a part of a full checkpoint into a sub-module.
        part: fill it from a part of the training state instead, which has names of its own: ``"ema"`` for an averaged model, or
            ``"teachers/0"``. It is the state of a module or a dict of tensors. Flags stay as they are.
        strict: raise if names or shapes differ; otherwise load what fits and report the rest. In a collective load, a name that is only in
            the checkpoint is one that no rank has.
        restore_frozen: set ``requires_grad`` of every floating-point parameter to what was saved, if the checkpoint records it.
        verify: as in ``load``.
        process_group: the group whose processes load together, each what its module holds, so that every byte is read once in the job:
            DTensors, stages of a pipeline, experts, or replicas. None: this process loads alone, unless there are DTensors (FSDP2, tensor
            parallel); then all processes of the job load.
        rank_timeout: in a collective load, the most seconds without a sign of life of another rank, and until all have made the call.
        phase_timeout: in a collective load, the most seconds for one phase of the call, though all ranks give signs of life.
        progress: as in ``save``.

    Collective:
        With a ``process_group``, or with DTensors, all ranks of the group (without one: of the job) must make the call, with equal
        arguments but for ``device`` and ``progress``. The files may come from any number of ranks. No rank changes its module before all
        have checked theirs; an error of one is then raised on all, and names the rank. Modules may be on the meta device, also under
        ``fully_shard``. Rank 0 logs.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        IncompatibleCheckpointError: names or shapes differ (all are listed), there is no such ``part`` (those that there are are
            listed), or the module cannot be filled; it is unchanged.
        CorruptCheckpointError: a checksum is wrong; the module is then partly loaded, and the message says how many tensors
            were loaded.
        OutOfMemoryError: its new tensors do not fit in memory; it is unchanged.
        CheckpointNotFoundError, UnsupportedTensorError, DirectoryBusyError.
        ShardSaveError: a file cannot be read, or in a collective load a rank did not come or was lost; the message names it.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2).requires_grad_(False)
        >>> report = shardsave.save(model, "frozen-linear")
        >>> fresh = torch.nn.Linear(4, 2)
        >>> report = shardsave.load_model(fresh, "frozen-linear")
        >>> fresh.weight.requires_grad
        False
    """
    clock = LoadClock()
    with job_of_load(model, path, "load", process_group, rank_timeout, phase_timeout) as job:

        def check() -> torch.device | None:
            if not isinstance(model, nn.Module):
                raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
            check_switches(strict=strict, restore_frozen=restore_frozen, verify=verify)
            check_progress(progress)
            check_path(path)
            check_operators("load", path, "the module is unchanged")
            check_names(None, prefix)
            check_part(part)
            return check_device(device)

        target_device, _ = job.attempt(check)
        job.check_equal({"prefix": prefix, "part": part, "strict": strict, "restore_frozen": restore_frozen, "verify": verify})
        wanted, parts = needed_files(model, prefix, part)
        with opened(job, os.fspath(path), wanted, parts) as checkpoint:
            planning = partial(ModelLoad, strict=strict, restore_frozen=restore_frozen, part=part, parts=job.parts)
            loading, lack_the_same = job.attempt(
                partial(planning, model, checkpoint, prefix, target_device), ModelLoad.not_here
            )
            loading.agree_on_names(job, lack_the_same)
            lacking = job.checked(loading.host_bytes)
            clock.planned()
            with Progress(progress if job.leads or callable(progress) else False, "loading", loading.nbytes) as reporter:
                reader = job.reader(checkpoint, verify=verify, progress=reporter)
                loading.fill(reader)
            clock.transferred()
            notes = (*lacking, *checkpoint.notes())
        report = loading.report(clock.report(path, loading.reads, reader, job=job), notes)
    if job.leads:
        log_load(report, (*loading.warnings, *notes))
    return report
