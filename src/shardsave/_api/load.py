"""`load` and `load_model`: from a checkpoint to new tensors, or into a live module."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.device import Device, check_device
from shardsave._api.reports import LoadReport, Phases
from shardsave._common.backend import engine_name
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._huggingface.detection import adapted, pretrained
from shardsave._loading import fit_module
from shardsave._loading.mapped import Maps
from shardsave._loading.new_tensors import new_tensors
from shardsave._loading.read import TensorReader
from shardsave._loading.selection import check_names, choose, choose_located, selection
from shardsave._loading.slots import extra_state_names, sub_modules
from shardsave._loading.stored_bytes import same_bytes
from shardsave._state.module import unwrap
from shardsave._storage.checkpoint import Checkpoint, open_checkpoint
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError


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

    Tied names share one storage, in files of others those of which their metadata tells. Only the bytes that are asked for are
    read, straight to ``device``.

    Args:
        path: the checkpoint.
        device: where the tensors go; the CPU by default.
        names: only these, as they stand in the checkpoint; each begins with ``prefix``.
        prefix: only names that begin with it (``"layer2."``); it is removed from the names given back.
        verify: check every tensor read against its stored checksum, where there is one.
        mmap: map the files instead of reading them (CPU only): private, zero-copy, at once, and not verified.
        progress: as in ``save``.

    Returns:
        A new dict from names to tensors with the dtype and shape that were saved, none requiring grad.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError, CorruptCheckpointError, DirectoryBusyError.
        IncompatibleCheckpointError: a name asked for is not there.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"a.x": torch.arange(3), "b": torch.ones(2)}, "two-tensors")
        >>> shardsave.load("two-tensors", prefix="a.")
        {'x': tensor([0, 1, 2])}
    """
    check_switches(verify=verify, mmap=mmap)
    check_progress(progress)
    check_path(path)
    wanted = check_names(names, prefix)
    where = check_device(device) or torch.device("cpu")
    if mmap and where.type != "cpu":
        raise ValueError(f"mmap=True gives tensors on the CPU, device {where} was asked for")
    with open_checkpoint(path, selection(wanted, prefix)) as checkpoint:
        chosen = choose(checkpoint, wanted, prefix)
        by_stored = {stored: checkpoint.tensors[stored] for stored in chosen.values()}
        if mmap:
            tensors = Maps(checkpoint).tensors(by_stored)
        else:
            tensors = new_tensors(by_stored, where)
            with Progress(progress, "loading", sum(t.nbytes for t in by_stored.values())) as shown:
                reader = TensorReader(checkpoint, verify=verify, progress=shown)
                reader.read([*zip(by_stored.values(), tensors.values())])
        return {name.removeprefix(prefix): tensors[stored] for name, stored in chosen.items()}


@verb()
def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    device: Device = None,
    prefix: str = "",
    strict: bool = True,
    restore_frozen: bool = True,
    verify: bool = True,
    progress: ProgressArgument = None,
) -> LoadReport:
    """Fills ``model`` in place from a checkpoint, and gives its parameters back the ``requires_grad`` that they had.

    ``Parameter`` objects keep their identity, so an optimizer that holds them stays valid; those on the meta device are
    replaced, as ``load_state_dict(assign=True)`` does. There is never a second copy of the model. Values are cast to the
    module's dtypes as ``load_state_dict`` does. Everything that can be refused is refused before a tensor is changed. Only a
    sub-module with a loading routine of its own (hooks, an override, extra state) decides itself what it takes: it is given all
    that is stored below its name, one such sub-module after the other, before anything else is filled. Extra
    state that is no tensor comes from the architecture, where one was saved and it is plain data.

    Args:
        model: a module or sub-module; wrappers (``torch.compile``, DDP, DataParallel) are seen through.
        path: as in ``load``.
        device: move or materialise every tensor there; None keeps each where it is (meta becomes the CPU).
        prefix: load only names that begin with it, without it: a part of a full checkpoint into a sub-module.
        strict: raise when names or shapes differ; otherwise load what fits and report the rest.
        restore_frozen: set ``requires_grad`` of every floating-point parameter to what was saved, where that is known.
        verify: as in ``load``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        IncompatibleCheckpointError: names or shapes differ (all are listed), or the module cannot be filled; unchanged.
        CorruptCheckpointError: a checksum is wrong; the module is then partly loaded, and the message says how far.
        CheckpointNotFoundError, UnsupportedTensorError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2).requires_grad_(False)
        >>> report = shardsave.save(model, "frozen-linear")
        >>> fresh = torch.nn.Linear(4, 2)
        >>> report = shardsave.load_model(fresh, "frozen-linear")
        >>> fresh.weight.requires_grad
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    check_switches(strict=strict, restore_frozen=restore_frozen, verify=verify)
    check_progress(progress)
    check_path(path)
    check_names(None, prefix)
    where = check_device(device)
    started = time.perf_counter()
    has_states = any(type(part).get_extra_state is not nn.Module.get_extra_state for part in model.modules())
    own_states = extra_state_names(sub_modules(unwrap(model))) if has_states else []
    with open_checkpoint(path, selection(None, prefix), parts=("architecture",) if own_states else ()) as checkpoint:
        stored = choose_located(checkpoint, prefix)
        hub, where_from = pretrained(model), os.fspath(path)
        converted: Any = None
        if hub is not None:
            from shardsave._huggingface.transformers_loading import conversion  # no other model needs it

            converted = conversion(hub, stored, where_from)
        elif (adapter := adapted(model)) is not None:
            from shardsave._huggingface.peft_loading import adapter_names

            converted = adapter_names(adapter, stored, where_from)
        if converted is not None:
            stored = converted.stored
        fit = fit_module.fit_module(
            model,
            stored,
            device=where,
            strict=strict,
            equal=lambda left, right: same_bytes(checkpoint, left, right),
            where=where_from,
            joins=converted,
            optional=converted.optional if converted is not None else lambda name: False,
            told_ties=[name.removeprefix(prefix) for name in checkpoint.ties] if checkpoint.record is None else (),
            extra_states=_extra_states(checkpoint, [name for name in own_states if name not in stored], prefix, strict),
        )
        reads = fit.reads
        planned = time.perf_counter()
        with Progress(progress, "loading", sum(located.nbytes for located in reads)) as shown:
            reader = TensorReader(checkpoint, verify=verify, progress=shown)
            fit.materialise()
            for group in fit.groups():
                whole = reader.tensors
                try:
                    reader.read(group.targets)
                    missing, unexpected = group.finish(strict)
                except ShardSaveError as error:
                    if group.in_place and isinstance(error, CorruptCheckpointError):
                        whole = reader.tensors  # the others of this group were read, and are what was saved
                    raise type(error)(f"{error}; the module is partly loaded, {whole} of {len(reads)} tensors") from error
                finally:
                    fit.written()
                fit.missing += tuple(missing)
                fit.unexpected += tuple(unexpected)
                del group  # before the next: the memory of one sub-module's copy, not of two
        transferred = time.perf_counter()
        flags = checkpoint.flags if restore_frozen else None
        own_flags = flags
        if flags is not None and prefix:
            own_flags = {n.removeprefix(prefix): f for n, f in flags.items() if n.startswith(prefix)}
        if converted is not None and own_flags is not None:
            own_flags = converted.flags(own_flags)
        frozen = fit.restore_flags(own_flags)
        notes = (*reader.totals.notes, *fit.notes(), *checkpoint.companion_notes())
    ended = time.perf_counter()
    return LoadReport(
        path=os.fspath(path),
        bytes=reader.totals.bytes,
        tensors=reader.tensors,
        shards=len({located.shard for located in reads}),
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=transferred - planned, commit=ended - transferred),
        engine=engine_name(),
        direct=reader.totals.direct,
        staging_bytes=reader.totals.staging_bytes,
        pinned=reader.totals.pinned,
        notes=notes,
        verified=reader.verified,
        missing=fit.missing,
        unexpected=fit.unexpected,
        mismatched=fit.mismatched,
        frozen=frozen,
        changed_flags=fit.changed_flags,
    )


def _extra_states(checkpoint: Checkpoint, names: list[str], prefix: str, strict: bool) -> dict[str, Any]:
    """The extra state that is no tensor of the modules whose state dict has ``names``, as the checkpoint's architecture tells it."""
    data = checkpoint.documents.get("architecture")
    if data is None or not names:
        return {}
    from shardsave._architecture.extra_states import extra_states  # no model without any needs these
    from shardsave._architecture.values import Document

    document = Document(data, f"the architecture in {checkpoint.path}")
    found, others = extra_states(document, [prefix + name for name in names])
    if others and strict:
        raise IncompatibleCheckpointError(
            f"cannot load {checkpoint.path}: extra state of plain data was expected, {others[0]!r} has tensors or objects in it; build the "
            f"whole model with build_model, or leave extra state as it is with strict=False; the module is unchanged"
        )
    return {name.removeprefix(prefix): value for name, value in found.items()}
