"""What a save will contain: read from a module or a mapping, checked and planned, before anything is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Union

import torch
from torch import nn

from shardsave._api.arguments import check_switches, parse_size
from shardsave._api.moments import check_moment
from shardsave._api.save_parts import Among, Needed, PlannedParts, plan_parts
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._common.words import an, count
from shardsave._format.index import Moment
from shardsave._format.metadata import check_metadata
from shardsave._format.quantised import PLAIN, TENSOR_NAMES
from shardsave._huggingface.choose_saving import choose_layout
from shardsave._saving.casts import cast_on_disk, check_dtype
from shardsave._saving.contents import Contents, plan_contents
from shardsave._saving.disk_layout import DiskLayout
from shardsave._saving.frozen import FrozenMemory, frozen_memory
from shardsave._saving.job import ALONE, Job, Said
from shardsave._saving.trainable import only_trainable
from shardsave._saving.training_directory import DescribedTraining
from shardsave._state.distributed_tensors import PartReader, is_parameter
from shardsave._state.module import Source, State, read_state
from shardsave.errors import UnsupportedModuleError, UnsupportedTensorError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._program.capture import Program


class Planned(NamedTuple):
    """What a save will write, read from its source and checked. ``cast``, ``left_out``, ``needed``: for the report. ``warnings``: what the
    caller must be warned of once it is saved; the notes of the contents have it too. ``frozen``: name on disk → the memory of a frozen
    parameter that may be assumed to be unchanged. ``options``: the arguments that decide what of a state is stored.
    """

    contents: Contents
    needed: Needed
    cast: int
    left_out: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    frozen: Mapping[str, FrozenMemory] = {}
    options: Mapping[str, object] = {}


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


class OwnContents(NamedTuple):
    """What one process has read of what is saved, as it was in the call. Among several, each has its own.

    ``training``: the training state as data; ``epoch``, ``notes`` and ``warnings`` are those of `TrainingState`.
    """

    checked: _Checked
    layout: DiskLayout
    state: State
    training: DescribedTraining | None
    epoch: float | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def read_own(source: Source, what: What, readers: PartReader | None) -> OwnContents:
    """Checks ``what``, and reads it in this process. ``readers``: as `Job.parts`. Raises what `save` raises for it."""
    checked = check_what(what)
    with_parts = what.architecture or what.program is not None
    if with_parts and not isinstance(source, nn.Module):
        option = "architecture=True" if what.architecture else "a program"
        raise TypeError(f"{option} needs an nn.Module, not {an(type(source).__name__)}")
    layout = choose_layout(source, what.adapter_only, with_parts=with_parts)
    with gc_paused():
        training, epoch, notes, warnings = _described(source, what, readers)
        state = _read_state(source, what.architecture, readers)
    return OwnContents(checked, layout, state, training, epoch, notes, warnings)


def attempted(source: Source, what: What, job: Job, check: Callable[[], str]) -> tuple[str, OwnContents]:
    """What ``check`` returns, and `read_own`, once both have succeeded for all processes of ``job``."""
    return job.attempt(
        lambda: (check(), read_own(source, what, job.parts)),
        said=lambda both: Said(both[1].state, both[1].training, both[1].layout),
    )


def plan(source: Source, what: What, own: OwnContents, job: Job = ALONE) -> Planned:
    """Plans what all processes of ``job`` have read: for all of them the same. Raises what `save` raises; writes nothing."""
    target, max_shard_bytes = own.checked.dtype, own.checked.max_shard_bytes
    with_parts = what.architecture or what.program is not None
    with gc_paused():
        directories = job.plan_training(own.training, max_shard_bytes)
        state = job.agree(own.state)
        if state.file_metadata and (with_parts or target is not None):
            _refuse_quantised(state, with_parts)
        warnings = own.warnings
        parts, notes, needed = PlannedParts()
        if with_parts and isinstance(source, nn.Module):
            among = Among(job.parts, state, leads=job.leads) if job.parts is not None else None
            with job.for_all():  # they all describe the same module
                parts, notes, needed = plan_parts(
                    source, own.state, among, architecture=what.architecture, program=what.program
                )
        if isinstance(source, nn.Module) and not state.entries:
            note, matters = _note_without_tensors(source)
            notes = (*notes, note)
            if matters or not (with_parts or directories):
                warnings = (*warnings, note)
        on_disk = job.lay_out(own.layout, state)
        left_out: tuple[str, ...] = ()
        if what.only is not None:
            on_disk, left_out = only_trainable(on_disk, source, state)
        on_disk, cast = cast_on_disk(on_disk, target)
        on_disk = on_disk._replace(notes=(*on_disk.notes, *state.notes, *notes, *own.notes))
        contents = plan_contents(
            on_disk,
            parts,
            max_shard_bytes,
            own.checked.metadata,
            directories=directories,
            moment=own.checked.moment._replace(epoch=own.epoch, ranks=own.checked.moment.ranks and job.size),
            packings=job.packings,
        )
        frozen = frozen_memory(on_disk.state.entries, _unstepped(source, what.training)) if what.assume_frozen_unchanged else {}
        dtype = None if target is None else str(target)
        options = {"dtype": dtype, "only": what.only, "adapter_only": what.adapter_only}
        return Planned(contents, needed, cast, left_out, warnings, frozen, options)


def _unstepped(source: Source, training: Any) -> Iterator[nn.Parameter]:
    """The parameters of ``source`` that are in no optimizer of ``training``."""
    values = source.parameters() if isinstance(source, nn.Module) else source.values()
    stepped = {
        id(parameter)
        for optimizer in _optimizers(training)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return (value for value in values if is_parameter(value) and id(value) not in stepped)


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


def _described(
    source: Source, what: What, readers: PartReader | None
) -> tuple[DescribedTraining | None, float | None, tuple[str, ...], tuple[str, ...]]:
    """The training state as data, its epoch, notes and warnings."""
    if what.training is None and not what.rng:
        return None, None, (), ()
    import_at_use("shardsave._training.describe")  # a plain save must not import this
    from shardsave._training.describe import describe

    rank = readers.rank if readers is not None else 0
    model = source if isinstance(source, nn.Module) else None
    state = describe(what.training, model, rng=what.rng, rank=rank, parts=readers)
    leaves = _json(state.leaves) if state.leaves else None
    described = DescribedTraining(_json(state.shared), leaves, state.shared_entries, state.own_entries, state.has_distributed)
    return described, state.epoch, state.notes, state.warnings


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


def _read_state(source: Source, architecture: bool, reader: PartReader | None) -> State:
    """Reads ``source`` once; after that, only the memory of its tensors is read."""
    try:
        return read_state(source, tensors_only=architecture, reader=reader)
    except RecursionError as error:
        raise UnsupportedModuleError(
            f"cannot save the model: its modules are nested more deeply than Python's recursion limit ({sys.getrecursionlimit()}) "
            "allows, or one contains itself; nothing was written"
        ) from error


def _note_without_tensors(module: nn.Module) -> tuple[str, bool]:
    """A note that nothing of ``module`` is saved; and whether it has parameters, so that this must be a warning whatever else is saved."""
    parameters = sum(1 for _ in module.parameters())
    found = f"it is empty, although the module has {count(parameters, 'parameter')}" if parameters else "it is empty"
    note = f"no tensor is saved: tensors were expected in the state dict of the module ({type(module).__name__}), {found}"
    return note, parameters > 0
