"""`load` and `load_model`: from a checkpoint to new tensors, or into a live module."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, Union

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches
from shardsave._api.reports import LoadReport, Phases
from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import collector_still
from shardsave._common.os_calls import CallFailed, read_at
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._huggingface.peft import adapter_names
from shardsave._huggingface.transformers_saving import pretrained
from shardsave._loading import fit_module
from shardsave._loading.mapped import Maps
from shardsave._loading.read import ReadTotals, read_tensors
from shardsave._loading.selection import check_names, choose, selection
from shardsave._loading.slots import extra_state_names, sub_modules
from shardsave._state.wrappers import unwrap
from shardsave._storage.checkpoint import Checkpoint, Located, open_checkpoint
from shardsave._storage.find import cannot_read
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, ShardSaveError

Device = Union[str, torch.device, int, None]


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
    where = device_of(device) or torch.device("cpu")
    if mmap and where.type != "cpu":
        raise ValueError(f"mmap=True gives tensors on the CPU, device {where} was asked for")
    with open_checkpoint(path, selection(wanted, prefix)) as checkpoint:
        chosen = choose(checkpoint, wanted, prefix)
        by_stored = {stored: checkpoint.tensors[stored] for stored in chosen.values()}
        if mmap:
            tensors = Maps(checkpoint).tensors(by_stored)
        else:
            with collector_still():
                tensors = dict(zip(by_stored, _new_tensors(by_stored.values(), where)))
                targets = [*zip(by_stored.values(), tensors.values())]
            with Progress(progress, "loading", sum(t.nbytes for t in by_stored.values())) as shown:
                read_tensors(checkpoint, targets, verify=verify, progress=shown, totals=ReadTotals())
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
    where = device_of(device)
    started = time.perf_counter()
    has_states = any(type(part).get_extra_state is not nn.Module.get_extra_state for part in model.modules())
    own_states = extra_state_names(sub_modules(unwrap(model))) if has_states else []
    with open_checkpoint(path, selection(None, prefix), parts=("architecture",) if own_states else ()) as checkpoint:
        chosen = choose(checkpoint, None, prefix)
        stored = {name.removeprefix(prefix): checkpoint.tensors[original] for name, original in chosen.items()}
        hub, where_from = pretrained(model), os.fspath(path)
        if hub is not None:
            from shardsave._huggingface.transformers_loading import conversion  # no other model needs it
        converted = conversion(hub, stored, where_from) if hub is not None else adapter_names(model, stored, where_from)
        if converted is not None:
            stored = converted.stored
        fit = fit_module.fit_module(
            model,
            stored,
            device=where,
            strict=strict,
            equal=lambda left, right: _equal_on_disk(checkpoint, left, right),
            where=where_from,
            joins=converted,
            optional=converted.optional if converted is not None else lambda name: False,
            told_ties=[name.removeprefix(prefix) for name in checkpoint.ties] if checkpoint.record is None else (),
            extra_states=_extra_states(checkpoint, [name for name in own_states if name not in stored], prefix, strict),
        )
        reads = fit.reads
        planned = time.perf_counter()
        totals = ReadTotals()
        with Progress(progress, "loading", sum(located.nbytes for located in reads)) as shown:
            fit.materialise()
            for group in fit.groups():
                whole = totals.tensors
                try:
                    read_tensors(checkpoint, group.targets, verify=verify, progress=shown, totals=totals)
                    missing, unexpected = group.finish(strict)
                except ShardSaveError as error:
                    if group.in_place and isinstance(error, CorruptCheckpointError):
                        whole = totals.tensors  # the others of this group were read, and are what was saved
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
        notes = (*totals.notes, *fit.notes(), *checkpoint.companion_notes())
    ended = time.perf_counter()
    return LoadReport(
        path=os.fspath(path),
        bytes=totals.bytes,
        tensors=totals.tensors,
        shards=len({located.shard for located in reads}),
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=transferred - planned, commit=ended - transferred),
        engine=engine_name(),
        direct=totals.direct,
        staging_bytes=totals.staging_bytes,
        pinned=totals.pinned,
        notes=notes,
        verified=totals.verified,
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


def _new_tensors(stored: Iterable[Located], device: torch.device) -> Iterator[torch.Tensor]:
    """Memory for each of ``stored``. Made like the first of their kind, which takes half the time that it takes to say what is wanted."""
    firsts: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for t in stored:
        first = firsts.get((t.dtype, t.shape))
        if first is not None:
            yield torch.empty_like(first)
            continue
        made = torch.empty(torch_shape(t.dtype, t.shape), dtype=BY_NAME[t.dtype].torch, device=device)
        firsts[t.dtype, t.shape] = made
        yield made


def device_of(device: Device) -> torch.device | None:
    """The device that is meant, None for none. Raises TypeError, ValueError."""
    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device must be a torch.device, its name or its number, not {type(device).__name__}")
    try:
        made = torch.device(device)
        if made.type != "meta":
            torch.empty(0, device=made)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} was asked for, torch has none: {str(error).splitlines()[0]}") from error
    if made.type == "meta":
        raise ValueError("device must hold data, the meta device does not")
    return made


def _equal_on_disk(checkpoint: Checkpoint, left: Located, right: Located) -> bool:
    """Whether two stored tensors hold the same bytes, by their checksums where they have them."""
    if (left.dtype, left.shape) != (right.dtype, right.shape) or not (left.shard and right.shard):
        return False
    if left.checksum is not None and right.checksum is not None:
        return left.checksum == right.checksum
    if (left.shard, left.offset) == (right.shard, right.offset):
        return True
    step = 1 << 20
    a, b = checkpoint.descriptors([left.shard, right.shard])
    try:
        return all(
            read_at(a, min(step, left.nbytes - at), left.offset + at)
            == read_at(b, min(step, left.nbytes - at), right.offset + at)
            for at in range(0, left.nbytes, step)
        )
    except CallFailed as error:
        raise cannot_read(checkpoint.path_of(left.shard), error) from error
