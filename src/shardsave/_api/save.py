"""`save`: from a module to a committed checkpoint."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches, check_timeout, parse_size
from shardsave._api.operators import check_operators
from shardsave._api.reports import SaveReport
from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._common.os_calls import absolute_path
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._common.words import an, count
from shardsave._format.metadata import check_metadata
from shardsave._huggingface.added_adapter import has_added_adapter
from shardsave._huggingface.added_adapter_saving import AddedAdapterLayout
from shardsave._huggingface.peft_saving import AdapterLayout
from shardsave._huggingface.recognize import peft_model, transformers_model
from shardsave._huggingface.transformers_saving import TransformersLayout
from shardsave._saving.contents import Contents, plan_contents
from shardsave._saving.disk_layout import DiskLayout, IdentityLayout
from shardsave._saving.write import write_checkpoint
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.module import Source, State, read_state
from shardsave._state.parts import Parts
from shardsave._state.wrappers import unwrap
from shardsave.errors import UnsupportedModuleError

if TYPE_CHECKING:
    from shardsave._program.capture import Program


@uncompiled
@verb()
def save(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: Union[int, str] = "2GB",
    durable: bool = True,
    metadata: Mapping[str, Any] | None = None,
    architecture: bool = False,
    program: Program | None = None,
    adapter_only: bool = False,
    progress: ProgressArgument = None,
    lock_timeout: float = 600.0,
) -> SaveReport:
    """Saves a module, a sub-module, or a mapping from names to tensors as the checkpoint in ``directory``.

    Tensors keep their dtype and shape, parameters their ``requires_grad``; tied tensors are stored once. A checkpoint that is
    already there is replaced by one rename, or stays intact, whoever wrote it; other files in the directory are not touched.

    Args:
        source: an ``nn.Module``, with or without wrappers (``torch.compile``, DDP, DataParallel), or a mapping from names to
            tensors, Parameters or numpy arrays of any dtype of safetensors.
        directory: created if it does not exist.
        max_shard_size: the most bytes of tensor data in one file, as an int or ``"5GB"``, ``"500MB"``, ``"2GiB"``.
        durable: wait until the checkpoint would survive a loss of power; if False, it survives only the end of the process.
        metadata: name → JSON value, returned by ``inspect``; keys are strings on every level, tuples come back as lists.
        architecture: also store the module tree as data, so that ``build_model`` builds the whole model again without calling its
            constructor. Anything that cannot be stored as data is refused; hooks are left out, with one warning.
        program: ``(args, kwargs)`` for ``forward``, or the result of ``torch.export.export``: also store what the model computes,
            as a graph of torch's operators that ``load_program`` runs without the model's classes.
        adapter_only: save only the active adapter of a PEFT model, in PEFT's layout, and the flags of the whole model.
        progress: None shows a bar if the call takes long and stderr is a terminal; True or False forces or forbids the bar; a
            callable receives (bytes done, bytes in total).
        lock_timeout: seconds to wait for another save into the same directory.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UnsupportedTensorError: a tensor cannot be stored; nothing was written.
        UnsupportedModuleError: the architecture or the program cannot be stored (all reasons are listed), or a module contains
            itself; nothing was written.
        DirectoryBusyError, OutOfSpaceError, SaveNotCommittedError: nothing was committed, a previous checkpoint is intact.
        DurabilityUncertainError: the new checkpoint is in place, but may not survive a loss of power.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> report = shardsave.save(model, "linear-checkpoint")
        >>> report.tensors
        2
    """
    check_path(directory)
    check_operators("save to", directory, "nothing was written")
    path = absolute_path(os.fspath(directory))
    check_switches(durable=durable, architecture=architecture, adapter_only=adapter_only)
    if (architecture or program is not None) and not isinstance(source, nn.Module):
        option = "architecture=True" if architecture else "a program"
        raise TypeError(f"{option} needs an nn.Module, not {an(type(source).__name__)}")
    if program is not None:
        import_at_use("shardsave._program.capture")  # imports torch.export, which few saves need
        from shardsave._program.capture import check_program

        check_program(program)
    check_progress(progress)
    check_timeout(lock_timeout)
    max_shard_bytes = parse_size(max_shard_size)
    user_metadata = check_metadata(metadata)
    layout = _choose_layout(source, adapter_only, with_parts=architecture or program is not None)
    started = time.perf_counter()
    with gc_paused():
        contents, needed = _read_contents(source, layout, architecture, program, max_shard_bytes, user_metadata)
    plan_seconds = time.perf_counter() - started
    with Progress(progress, "saving", contents.tensor_bytes) as reporter:
        outcome = write_checkpoint(contents, path, durable=durable, lock_timeout=lock_timeout, progress=reporter)
    return SaveReport(
        path=os.fspath(directory),
        bytes=contents.weight_bytes,
        tensors=outcome.tensors,
        shards=outcome.shards,
        seconds=time.perf_counter() - started,
        phases=replace(outcome.phases, plan=plan_seconds + outcome.phases.plan),
        engine=engine_name(),
        direct=outcome.totals.direct,
        staging_bytes=outcome.totals.staging_bytes,
        pinned=outcome.totals.pinned,
        notes=outcome.notes,
        durable=durable,
        removed=outcome.removed,
        leftovers=outcome.leftovers,
        overlaps=contents.state.overlaps,
        trust=needed.trust,
        script_classes=needed.script_classes,
    )


def _choose_layout(source: Source, adapter_only: bool, *, with_parts: bool) -> DiskLayout:
    """The layout of ``source`` on disk. ``with_parts``: keep the names in the module, which an architecture and a program refer to."""
    if adapter_only:
        adapter = peft_model(source)
        if adapter is None:
            raise TypeError(f"adapter_only=True needs a PeftModel, not {an(type(source).__name__)}")
        if with_parts:
            raise ValueError("adapter_only=True saves no architecture and no program: they need the base model's weights")
        return AdapterLayout(adapter)
    model = transformers_model(source)
    if model is None:
        return IdentityLayout()
    return (AddedAdapterLayout if has_added_adapter(model) else TransformersLayout)(model, keep_names=with_parts)


def _read_contents(
    source: Source,
    layout: DiskLayout,
    architecture: bool,
    program: Program | None,
    max_shard_bytes: int,
    metadata: Mapping[str, Any],
) -> tuple[Contents, _Needed]:
    """Everything that the save will write, and what a build of its architecture needs.

    Reads ``source`` once; after that, only the memory of its tensors is read.
    """
    try:
        state = read_state(source, tensors_only=architecture)
    except RecursionError as error:
        raise UnsupportedModuleError(
            f"cannot save the model: its modules are nested more deeply than Python's recursion limit ({sys.getrecursionlimit()}) "
            "allows, or one contains itself; nothing was written"
        ) from error
    parts, notes, needed = _parts(source, state, architecture, program)
    if isinstance(source, nn.Module) and not state.entries:
        notes = (*notes, _note_without_tensors(source, alone=not (architecture or program is not None)))
    on_disk = layout.apply(state)
    return plan_contents(
        on_disk._replace(notes=(*on_disk.notes, *state.notes, *notes)), parts, max_shard_bytes, metadata
    ), needed


def _note_without_tensors(module: nn.Module, *, alone: bool) -> str:
    """A note that nothing of ``module`` is saved. There is a warning too if it has parameters, or if ``alone``: no part is saved either."""
    parameters = sum(1 for _ in module.parameters())
    found = f"it is empty, although the module has {count(parameters, 'parameter')}" if parameters else "it is empty"
    note = f"no tensor is saved: tensors were expected in the state dict of the module ({type(module).__name__}), {found}"
    if parameters or alone:
        warn_caller(note)
    return note


class _Needed(NamedTuple):
    """What a build of the architecture needs: entries of ``trust``, and classes of a script for ``classes``."""

    trust: tuple[str, ...] = ()
    script_classes: tuple[str, ...] = ()


def _parts(source: Source, state: State, architecture: bool, program: Program | None) -> tuple[Parts, tuple[str, ...], _Needed]:
    """The requested parts, notes for the report, and what a build of the architecture needs."""
    documents: dict[str, bytes] = {}
    notes: tuple[str, ...] = ()
    needed = _Needed()
    if not isinstance(source, nn.Module) or not (architecture or program is not None):
        return Parts(), notes, needed
    module = unwrap(source)
    extra = ExtraTensors(state.entries)
    if architecture:
        import_at_use("shardsave._architecture.describe")  # a plain save must not import this
        from shardsave._architecture.describe import describe
        from shardsave._architecture.trust import script_classes, trust_entries

        documents["architecture"], lacking = describe(module, extra)
        needed = _Needed(trust_entries(lacking), script_classes(lacking))
    if program is not None:
        from shardsave._program.capture import capture

        captured = capture(module, program, extra)
        documents["program"], notes = captured.document, captured.notes
    return Parts(documents, tuple(extra.kept)), notes, needed
