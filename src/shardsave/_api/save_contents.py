"""What a save will contain: read from a module or a mapping, checked and planned, before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Union

import torch
from torch import nn

from shardsave._api.arguments import check_switches, parse_size
from shardsave._api.moments import check_moment
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._common.spread import Spread
from shardsave._common.warn_caller import warn_caller
from shardsave._common.words import an, count
from shardsave._format.index import Moment
from shardsave._format.metadata import check_metadata
from shardsave._format.quantised import PLAIN, TENSOR_NAMES
from shardsave._huggingface.choose_saving import choose_layout
from shardsave._saving.casts import cast_on_disk, check_dtype
from shardsave._saving.contents import Contents, PlannedDirectory, plan_contents
from shardsave._saving.frozen import FrozenMemory, frozen_memory
from shardsave._saving.job import ALONE, Job
from shardsave._saving.trainable import only_trainable
from shardsave._saving.training_directory import DescribedTraining
from shardsave._state.distributed_tensors import Parts as TensorParts
from shardsave._state.extra_tensors import ExtraTensors
from shardsave._state.module import Source, State, read_state
from shardsave._state.parts import Parts
from shardsave._state.wrappers import unwrap
from shardsave.errors import UnsupportedModuleError, UnsupportedTensorError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._program.capture import Program


class Needed(NamedTuple):
    """What a build of the architecture needs: entries of ``trust``, and classes of a script for ``classes``."""

    trust: tuple[str, ...] = ()
    script_classes: tuple[str, ...] = ()


class Planned(NamedTuple):
    """What a save will write, read from its source and checked. ``cast``, ``left_out``, ``needed``: for the report. ``warnings``: what the
    caller must be warned of once it is saved; the notes of the contents have it too. ``frozen``: name on disk → the memory of a frozen
    parameter that may be assumed to be unchanged.
    """

    contents: Contents
    needed: Needed
    cast: int
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    frozen: Mapping[str, FrozenMemory] = {}


class _PlannedTraining(NamedTuple):
    """``directories``: that of the training state, or none. ``epoch``: the one in it. ``notes``, ``warnings``: as in `TrainingState`."""

    directories: list[PlannedDirectory]
    epoch: float | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


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
    assume_frozen_unchanged: bool = False


def plan(source: Source, what: What, job: Job = ALONE) -> Planned:
    """Checks ``what``, and plans it: for all processes of ``job`` the same. Raises what `save` raises for it; writes nothing."""
    checked = check_what(what)
    with_parts = what.architecture or what.program is not None
    if with_parts and not isinstance(source, nn.Module):
        option = "architecture=True" if what.architecture else "a program"
        raise TypeError(f"{option} needs an nn.Module, not {an(type(source).__name__)}")
    target, max_shard_bytes = checked.dtype, checked.max_shard_bytes
    layout = choose_layout(source, what.adapter_only, with_parts=with_parts)
    with gc_paused():
        training = _training(source, what, max_shard_bytes, job)
        own = _read_state(source, what.architecture, job.parts)
        if job.parts is not None:
            _check_spread(own, what)
        state = job.agree(own)
        if state.file_metadata and (with_parts or target is not None):
            _refuse_quantised(state, with_parts)
        parts, notes, needed = _parts(source, own, what.architecture, what.program)
        if isinstance(source, nn.Module) and not state.entries:
            alone = not with_parts and not training.directories
            notes = (*notes, _note_without_tensors(source, alone=alone))
        on_disk = job.lay_out(layout, state)
        left_out: tuple[str, ...] = ()
        if what.only is not None:
            on_disk, left_out = only_trainable(on_disk, source, state)
        on_disk, cast = cast_on_disk(on_disk, target)
        on_disk = on_disk._replace(notes=(*on_disk.notes, *state.notes, *notes, *training.notes))
        contents = plan_contents(
            on_disk,
            parts,
            max_shard_bytes,
            checked.metadata,
            directories=training.directories,
            moment=checked.moment._replace(epoch=training.epoch, ranks=checked.moment.ranks and job.size),
        )
        frozen = frozen_memory(on_disk.state.entries, _unstepped(source, what.training)) if what.assume_frozen_unchanged else {}
        return Planned(contents, needed, cast, left_out, training.warnings, frozen)


def _unstepped(source: Source, training: Any) -> Iterator[nn.Parameter]:
    """The parameters of ``source`` that are in no optimizer of ``training``."""
    values = source.parameters() if isinstance(source, nn.Module) else source.values()
    stepped = {
        id(parameter)
        for optimizer in _optimizers(training)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return (value for value in values if type(value) is nn.Parameter and id(value) not in stepped)


def _optimizers(training: Any) -> Iterator[torch.optim.Optimizer]:
    """Every optimizer in ``training``, and in the lists, tuples and dicts that it is made of."""
    if isinstance(training, torch.optim.Optimizer):
        yield training
    elif isinstance(training, (list, tuple, Mapping)):
        for value in training.values() if isinstance(training, Mapping) else training:
            yield from _optimizers(value)


class _Checked(NamedTuple):
    """Arguments of a save as they are used."""

    max_shard_bytes: int
    metadata: dict[str, Any]
    moment: Moment
    dtype: torch.dtype | None


def check_what(what: What) -> _Checked:
    """Checks all that can be checked without the source. Raises TypeError or ValueError."""
    check_switches(architecture=what.architecture, adapter_only=what.adapter_only, rng=what.rng)
    check_switches(assume_frozen_unchanged=what.assume_frozen_unchanged)
    if what.program is not None:
        import_at_use("shardsave._program.capture")  # imports torch.export, which few saves need
        from shardsave._program.capture import check_program

        check_program(what.program)
    return _Checked(
        parse_size(what.max_shard_size),
        check_metadata(what.metadata),
        check_moment(what.step, what.metrics, is_training=what.training is not None or what.rng),
        _check_part(what, with_parts=what.architecture or what.program is not None),
    )


def _training(source: Source, what: What, max_shard_bytes: int, job: Job) -> _PlannedTraining:
    described = None
    state = None
    if what.training is not None or what.rng:
        import_at_use("shardsave._training.describe")  # a plain save must not import this
        from shardsave._training.describe import describe

        rank = job.parts.rank if job.parts is not None else 0
        model = source if isinstance(source, nn.Module) else None
        state = describe(what.training, model, rng=what.rng, rank=rank, parts=job.parts)
        leaves = _json(state.leaves) if state.leaves else None
        described = DescribedTraining(
            _json(state.shared), leaves, state.shared_entries, state.own_entries, state.has_distributed
        )
    directories, notes = job.plan_training(described, max_shard_bytes)
    if state is None:
        return _PlannedTraining([])
    return _PlannedTraining([*directories], state.epoch, (*state.notes, *notes), state.warnings)


def _json(value: Any) -> bytes:
    """``value``, which does not contain itself, as JSON in which only control characters are escaped."""
    text = json.dumps(value, allow_nan=False, check_circular=False)
    if "\\u" in text:  # without such an escape both forms are the same, and the other one takes twice as long
        text = json.dumps(value, allow_nan=False, check_circular=False, ensure_ascii=False)
    return text.encode()


def _check_part(what: What, *, with_parts: bool) -> torch.dtype | None:
    """Checks ``only``, ``dtype`` and ``adapter_only``; returns the dtype to cast to."""
    if what.only not in (None, "trainable"):
        raise ValueError(f"only must be 'trainable' or None, not {what.only!r}")
    target = check_dtype(what.dtype)
    cast = f"dtype={str(target).removeprefix('torch.')!r}"
    if what.only is not None and what.adapter_only:
        raise ValueError(
            "adapter_only=True and only='trainable' exclude each other: an adapter is saved in PEFT's layout, or as it is"
        )
    if with_parts and (what.only is not None or target is not None):
        option = "only='trainable'" if what.only is not None else cast
        raise ValueError(f"{option} saves no architecture and no program: they refer to all weights, by their dtypes in memory")
    if target is not None and (what.training is not None or what.rng):
        raise ValueError(
            f"{cast} saves no training state: it makes a copy for inference, and a training that resumes it would go on from weights "
            f"that were cast; leave out training= and rng=, or dtype="
        )
    return target


def _refuse_quantised(state: State, with_parts: bool) -> NoReturn:
    names = json.loads(state.file_metadata[TENSOR_NAMES])
    name = next(name for name in names if state.file_metadata[name] != PLAIN)
    option = "an architecture or a program" if with_parts else "dtype="
    raise UnsupportedTensorError(
        f"cannot save {name!r} with {option}: a plain tensor was expected, it is quantised; nothing was written"
    )


def _check_spread(state: State, what: What) -> None:
    """Refuses what cannot be saved of one process's ``state`` together with those of others."""
    spread = next((entry.name for entry in state.entries if isinstance(entry.source, Spread)), None)
    if (what.architecture or what.program is not None) and spread is not None:
        option = "architecture=True" if what.architecture else "a program"
        raise UnsupportedModuleError(
            f"cannot save the model with {option}: tensors that are whole in this process were expected, {spread!r} is spread over "
            f"several; nothing was written"
        )


def _read_state(source: Source, architecture: bool, reader: TensorParts | None) -> State:
    """Reads ``source`` once; after that, only the memory of its tensors is read."""
    try:
        return read_state(source, tensors_only=architecture, reader=reader)
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
