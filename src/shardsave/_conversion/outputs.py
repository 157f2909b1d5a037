"""Writes the three forms of a conversion: a checkpoint directory, one safetensors file, one file of torch.save."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import NamedTuple

from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import gc_paused
from shardsave._common.progress import Progress
from shardsave._common.warn_caller import warn_caller
from shardsave._common.words import some
from shardsave._conversion.changes import Names
from shardsave._conversion.converted import CarriedOver, converted_state
from shardsave._conversion.mapped_pages import ReleaseWhileWriting
from shardsave._conversion.new_file import NewFile
from shardsave._conversion.open_origin import open_origin
from shardsave._conversion.origin import Origin, Request
from shardsave._conversion.single_file import WriteResult, fits_torch, write_safetensors, write_torch
from shardsave._conversion.training import plan_training
from shardsave._foreign.pickled_tensors import Allowed
from shardsave._format.file_names import ADAPTER_WEIGHTS, INDEX_NAME
from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.metadata import check_metadata
from shardsave._format.quantised import without
from shardsave._saving.contents import Contents, plan_contents
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.write import write_checkpoint
from shardsave._state.module import State
from shardsave._state.parts import Parts
from shardsave.errors import OutOfSpaceError, SaveNotCommittedError, ShardSaveError

#: How many seconds a conversion waits for another save into its destination.
_LOCK_TIMEOUT = 600.0


class Output(NamedTuple):
    """Where and how a conversion writes; ``tick`` is called with the number of bytes written so far."""

    path: str
    origin: Origin
    durable: bool
    tick: Callable[[int], object]


def write_output(output: Output, to: str, state: State, carried: CarriedOver, max_shard_size: int) -> WriteResult:
    """Writes ``state`` in the form ``to``: "shardsave", "safetensors" or "torch"; only the first keeps what is ``carried`` over."""
    if to == "shardsave":
        return _write_directory(output, state, carried, max_shard_size)
    return _write_safetensors_file(output, state) if to == "safetensors" else _write_torch_file(output, state)


def _write_directory(output: Output, state: State, carried: CarriedOver, max_shard_size: int) -> WriteResult:
    with gc_paused():
        on_disk = OnDisk(state, carried.companions, carried.module_flags)
        if carried.adapter:
            on_disk = on_disk._replace(single_file=ADAPTER_WEIGHTS, in_single_file=carried.adapter)
        directories = [plan_training(carried.training, max_shard_size)] if carried.training is not None else []
        metadata = check_metadata(output.origin.metadata)
        contents = plan_contents(
            on_disk, carried.parts, max_shard_size, metadata, directories=directories, moment=output.origin.moment
        )
    return _write_contents(contents, output.path, output.durable, ReleaseWhileWriting(output.origin.mappings, output.tick))


def _write_contents(contents: Contents, path: str, durable: bool, release: ReleaseWhileWriting) -> WriteResult:
    with Progress(release, "converting", contents.tensor_bytes) as progress:
        outcome = write_checkpoint(contents, path, durable=durable, lock_timeout=_LOCK_TIMEOUT, progress=progress)
    for warning in outcome.warnings:
        warn_caller(warning)
    notes = (f"could not remove {', '.join(outcome.leftovers)}",) if outcome.leftovers else ()
    totals = outcome.totals
    return WriteResult(
        totals.direct,
        totals.staging_bytes,
        engine_name(),
        (*outcome.notes, *notes),
        outcome.shards,
        outcome.removed,
        outcome.leftovers,
        bool(outcome.warnings),
    )


def _write_safetensors_file(output: Output, state: State) -> WriteResult:
    """Keeps metadata whose value is a string, unless the key is the name of a tensor: the header stores ties under such keys."""
    names = {entry.name for entry in state.entries}
    texts = {name: value for name, value in output.origin.metadata.items() if isinstance(value, str)}
    kept = {name: value for name, value in texts.items() if name not in names and name not in ("format", CHECKSUM_KEY)}
    quantised = without(state.file_metadata, [entry.name for entry in state.entries if entry.tied_to is not None])
    release = ReleaseWhileWriting(output.origin.mappings, output.tick)
    with closing(NewFile(output.path, output.durable)) as file, file:
        result = write_safetensors(file, state.entries, {**quantised, **kept}, output.durable, release)
    return result._replace(notes=(*result.notes, *_notes_on_losses(output.origin, kept), *file.notes()), removed=file.removed)


def _write_torch_file(output: Output, state: State) -> WriteResult:
    with closing(NewFile(output.path, output.durable)) as file, file:
        result = _write_torch(output, state, file)
    return result._replace(notes=(*result.notes, *_notes_on_losses(output.origin, {}), *file.notes()), removed=file.removed)


def _write_torch(output: Output, state: State, file: NewFile) -> WriteResult:
    origin = output.origin
    if all(fits_torch(entry) for entry in state.entries if entry.tied_to is None):
        return write_torch(file, state.entries, ReleaseWhileWriting(origin.mappings, output.tick))
    # torch.save writes memory unchanged. So tensors that must change are first written to a checkpoint, which is then mapped.
    with ExitStack() as closing:
        try:
            contents = plan_contents(OnDisk(state), Parts(), sys.maxsize, {})
            file.make_workspace()
            _write_contents(contents, file.workspace, False, ReleaseWhileWriting(origin.mappings, lambda done: None))
            mapped = open_origin(
                os.path.join(file.workspace, INDEX_NAME), Request(None, Names((), ()).wanted, Allowed()), closing
            )
        except ShardSaveError as error:
            kind = OutOfSpaceError if isinstance(error, OutOfSpaceError) else SaveNotCommittedError
            raise kind(
                f"cannot write {file.path} by way of a directory beside it: {error}; a file that was at {file.path} is unchanged"
            ) from error
        state, _ = converted_state(mapped, Names((), ()), None, file.workspace)
        return write_torch(file, state.entries, ReleaseWhileWriting(mapped.mappings, output.tick))


def _notes_on_losses(origin: Origin, kept: Mapping[str, str]) -> tuple[str, ...]:
    """Notes about what a single file cannot hold. ``kept``: the metadata that it does hold."""
    lost_keys = sorted(origin.metadata.keys() - kept.keys())
    notes = ("freeze flags were left out",) if origin.flags is not None else ()
    return (*notes, f"metadata was left out: {some(lost_keys, 5)}") if lost_keys else notes
