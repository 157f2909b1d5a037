"""`save`: from a module to a committed checkpoint."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Union

import torch
from torch import nn

from shardsave._api.arguments import check_path, check_progress, check_switches, check_timeout, parse_size
from shardsave._api.moments import check_moment
from shardsave._api.operators import check_operators
from shardsave._api.process_group import check_process_group
from shardsave._api.reports import SaveReport, log_deletion
from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._common.log_records import log_record
from shardsave._common.os_calls import absolute_path
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._common.words import an, count
from shardsave._format.metadata import check_metadata
from shardsave._format.quantised import PLAIN, TENSOR_NAMES
from shardsave._huggingface.choose_saving import choose_layout
from shardsave._saving.casts import cast_on_disk, check_dtype
from shardsave._saving.contents import Contents, PlannedDirectory, plan_contents
from shardsave._saving.trainable import only_trainable
from shardsave._saving.write import write_checkpoint
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.module import Source, State, read_state
from shardsave._state.parts import Parts
from shardsave._state.wrappers import unwrap
from shardsave.errors import UnsupportedModuleError, UnsupportedTensorError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Any = None,
    rng: bool = False,
    process_group: ProcessGroup | None = None,
    architecture: bool = False,
    program: Program | None = None,
    adapter_only: bool = False,
    only: Literal["trainable"] | None = None,
    dtype: Union[torch.dtype, str, None] = None,
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
        step: how many steps of a training were finished; returned by ``inspect``, with the time of the save.
        metrics: name → real number (also a numpy or torch scalar), for example ``{"loss": 0.25}``; returned by ``inspect``.
        training: also store a training state: a nested dict or list of what has ``state_dict`` and ``load_state_dict`` (optimizers,
            schedulers, averaged models, data loaders, …), tensors, arrays, numbers and text; ``PerRank`` marks what belongs to one rank.
            ``resume`` brings it back. A number under ``"epoch"`` is returned by ``inspect`` too.
        rng: also store the random generators of python, numpy, torch and every CUDA device.
        process_group: a group of torch.distributed with one process, or None.
        architecture: also store the module tree as data, so that ``build_model`` builds the whole model again without calling its
            constructor. Anything that cannot be stored as data is refused; hooks are left out, with one warning.
        program: ``(args, kwargs)`` for ``forward``, or the result of ``torch.export.export``: also store what the model computes,
            as a graph of torch's operators that ``load_program`` runs without the model's classes.
        adapter_only: save only the active adapter of a PEFT model, in PEFT's layout, and the flags of the whole model.
        only: ``"trainable"`` saves the parameters that are not frozen, the buffers of their layers and running statistics, and the flags
            of the whole model: ``load_model(strict=False)`` puts them onto the rest, which comes from elsewhere.
        dtype: cast floating-point tensors to it on the way to disk, as ``convert`` does: a copy for inference. Tensors of 8 or 4 bits
            keep their dtype. The model in memory does not change.
        progress: None shows a bar if the call takes long and stderr is a terminal; True or False forces or forbids the bar; a
            callable receives (bytes done, bytes in total).
        lock_timeout: seconds to wait for another save into the same directory.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UnsupportedTensorError: a tensor cannot be stored; nothing was written.
        UnsupportedTrainingError: the training state holds something that is no data and has no state; nothing was written.
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
    check_switches(durable=durable)
    check_progress(progress)
    check_timeout(lock_timeout)
    started = time.perf_counter()
    what = What(
        max_shard_size, metadata, step, metrics, training, rng, process_group, architecture, program, adapter_only, only, dtype
    )
    planned = plan(source, what)
    contents = planned.contents
    plan_seconds = time.perf_counter() - started
    with Progress(progress, "saving", contents.tensor_bytes) as reporter:
        outcome = write_checkpoint(contents, path, durable=durable, lock_timeout=lock_timeout, progress=reporter)
    report = SaveReport(
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
        trust=planned.needed.trust,
        script_classes=planned.needed.script_classes,
        cast=planned.cast,
        left_out=planned.left_out,
        training_bytes=outcome.directory_bytes,
    )
    log_record("save", report, matters=bool(outcome.leftovers or outcome.warnings))
    log_deletion(report.path, report.removed, report.leftovers)
    return report


class Needed(NamedTuple):
    """What a build of the architecture needs: entries of ``trust``, and classes of a script for ``classes``."""

    trust: tuple[str, ...] = ()
    script_classes: tuple[str, ...] = ()


class Planned(NamedTuple):
    """What a save will write, read from its source and checked. ``cast``, ``left_out``, ``needed``: for the report."""

    contents: Contents
    needed: Needed
    cast: int
    left_out: tuple[str, ...]


class What(NamedTuple):
    """The arguments of `save` that say what to save."""

    max_shard_size: Union[int, str]
    metadata: Mapping[str, Any] | None
    step: int | None
    metrics: Mapping[str, Any] | None
    training: Any
    rng: bool
    process_group: ProcessGroup | None
    architecture: bool
    program: Program | None
    adapter_only: bool
    only: str | None
    dtype: Union[torch.dtype, str, None]


def plan(source: Source, what: What) -> Planned:
    """Checks ``what``, and plans it. Raises what `save` raises for it; writes nothing."""
    check_switches(architecture=what.architecture, adapter_only=what.adapter_only, rng=what.rng)
    check_process_group(what.process_group)
    if (what.architecture or what.program is not None) and not isinstance(source, nn.Module):
        option = "architecture=True" if what.architecture else "a program"
        raise TypeError(f"{option} needs an nn.Module, not {an(type(source).__name__)}")
    if what.program is not None:
        import_at_use("shardsave._program.capture")  # imports torch.export, which few saves need
        from shardsave._program.capture import check_program

        check_program(what.program)
    max_shard_bytes = parse_size(what.max_shard_size)
    user_metadata = check_metadata(what.metadata)
    moment = check_moment(what.step, what.metrics, is_training=what.training is not None or what.rng)
    with_parts = what.architecture or what.program is not None
    target = _check_part(what.only, what.dtype, what.adapter_only, with_parts)
    layout = choose_layout(source, what.adapter_only, with_parts=with_parts)
    with gc_paused():
        directories, epoch, training_notes = _training(source, what, max_shard_bytes)
        state = _read_state(source, what.architecture)
        if state.file_metadata and (with_parts or target is not None):
            _refuse_quantised(state, with_parts)
        parts, notes, needed = _parts(source, state, what.architecture, what.program)
        if isinstance(source, nn.Module) and not state.entries:
            alone = not with_parts and not directories
            notes = (*notes, _note_without_tensors(source, alone=alone))
        on_disk = layout.apply(state)
        left_out: tuple[str, ...] = ()
        if what.only is not None:
            on_disk, left_out = only_trainable(on_disk, source, state)
        on_disk, cast = cast_on_disk(on_disk, target)
        on_disk = on_disk._replace(notes=(*on_disk.notes, *state.notes, *notes, *training_notes))
        contents = plan_contents(
            on_disk, parts, max_shard_bytes, user_metadata, directories=directories, moment=moment._replace(epoch=epoch)
        )
        return Planned(contents, needed, cast, left_out)


def _training(source: Source, what: What, max_shard_bytes: int) -> tuple[list[PlannedDirectory], float | None, tuple[str, ...]]:
    """The directory of the training state (none, if there is none to save), the epoch in it, and notes for the report."""
    if what.training is None and not what.rng:
        return [], None, ()
    import_at_use("shardsave._training.describe")  # a plain save must not import this
    from shardsave._saving.training_directory import plan_training_directory
    from shardsave._training.describe import describe

    state = describe(what.training, source if isinstance(source, nn.Module) else None, rng=what.rng, rank=0)
    leaves = {0: _json(state.leaves)} if state.leaves else {}
    directory = plan_training_directory(_json(state.shared), leaves, {0: state.entries}, max_shard_bytes)
    return [directory], state.epoch, tuple(state.notes)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _check_part(only: object, dtype: object, adapter_only: bool, with_parts: bool) -> torch.dtype | None:
    """Checks ``only`` and ``dtype``; returns the dtype to cast to."""
    if only not in (None, "trainable"):
        raise ValueError(f"only must be 'trainable' or None, not {only!r}")
    target = check_dtype(dtype)
    if only is not None and adapter_only:
        raise ValueError(
            "adapter_only=True and only='trainable' exclude each other: an adapter is saved in PEFT's layout, or as it is"
        )
    if with_parts and (only is not None or target is not None):
        option = "only='trainable'" if only is not None else f"dtype={str(target).removeprefix('torch.')!r}"
        raise ValueError(f"{option} saves no architecture and no program: they refer to all weights, by their dtypes in memory")
    return target


def _refuse_quantised(state: State, with_parts: bool) -> NoReturn:
    names = json.loads(state.file_metadata[TENSOR_NAMES])
    name = next(name for name in names if state.file_metadata[name] != PLAIN)
    option = "an architecture or a program" if with_parts else "dtype="
    raise UnsupportedTensorError(
        f"cannot save {name!r} with {option}: a plain tensor was expected, it is quantised; nothing was written"
    )


def _read_state(source: Source, architecture: bool) -> State:
    """Reads ``source`` once; after that, only the memory of its tensors is read."""
    try:
        return read_state(source, tensors_only=architecture)
    except RecursionError as error:
        raise UnsupportedModuleError(
            f"cannot save the model: its modules are nested more deeply than Python's recursion limit ({sys.getrecursionlimit()}) "
            "allows, or one contains itself; nothing was written"
        ) from error


def _note_without_tensors(module: nn.Module, *, alone: bool) -> str:
    """A note that nothing of ``module`` is saved. There is a warning too if it has parameters, or if ``alone``: no part is saved either."""
    parameters = sum(1 for _ in module.parameters())
    found = f"it is empty, although the module has {count(parameters, 'parameter')}" if parameters else "it is empty"
    note = f"no tensor is saved: tensors were expected in the state dict of the module ({type(module).__name__}), {found}"
    if parameters or alone:
        warn_caller(note)
    return note


def _parts(source: Source, state: State, architecture: bool, program: Program | None) -> tuple[Parts, tuple[str, ...], Needed]:
    """The requested parts, notes for the report, and what a build of the architecture needs."""
    documents: dict[str, bytes] = {}
    notes: tuple[str, ...] = ()
    needed = Needed()
    if not isinstance(source, nn.Module) or not (architecture or program is not None):
        return Parts(), notes, needed
    module = unwrap(source)
    extra = ExtraTensors(state.entries)
    if architecture:
        import_at_use("shardsave._architecture.describe")  # a plain save must not import this
        from shardsave._architecture.describe import describe
        from shardsave._architecture.trust import script_classes, trust_entries

        documents["architecture"], lacking = describe(module, extra)
        needed = Needed(trust_entries(lacking), script_classes(lacking))
    if program is not None:
        from shardsave._program.capture import capture

        captured = capture(module, program, extra)
        documents["program"], notes = captured.document, captured.notes
    return Parts(documents, tuple(extra.kept)), notes, needed
