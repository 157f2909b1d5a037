"""The three forms that a conversion can write: a checkpoint directory, one safetensors file, one file of torch.save."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from shardsave._common.backend import engine_name
from shardsave._common.gc_pause import gc_paused
from shardsave._common.progress import Progress
from shardsave._common.words import some
from shardsave._conversion.changes import Names
from shardsave._conversion.converted import CarriedOver, converted_state
from shardsave._conversion.mapped_pages import ReleaseWhileWriting
from shardsave._conversion.origin import Origin, open_origin
from shardsave._conversion.single_file import NewFile, Written, fits_torch, write_safetensors, write_torch
from shardsave._format.file_names import INDEX_NAME
from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.metadata import check_metadata
from shardsave._saving.contents import Contents, plan_contents
from shardsave._saving.disk_layout import OnDisk
from shardsave._saving.write import write_checkpoint
from shardsave._state.module import State
from shardsave._state.parts import Parts
from shardsave.errors import OutOfSpaceError, SaveNotCommittedError, ShardSaveError

#: Seconds that a conversion waits for another save into its destination.
_LOCK_TIMEOUT = 600.0


class Output(NamedTuple):
    """Where a conversion writes to and how; ``tick`` is told how many bytes have been written."""

    path: str
    origin: Origin
    durable: bool
    tick: Callable[[int], object]


def write_directory(output: Output, state: State, carried: CarriedOver, max_shard_size: int) -> Written:
    """Writes a checkpoint directory, which also takes the parts and companions that are carried over."""
    with gc_paused():
        on_disk = OnDisk(state, carried.companions, carried.module_flags)
        contents = plan_contents(on_disk, carried.parts, max_shard_size, check_metadata(output.origin.metadata))
    return _write_contents(contents, output.path, output.durable, ReleaseWhileWriting(output.origin.mappings, output.tick))


def _write_contents(contents: Contents, path: str, durable: bool, release: ReleaseWhileWriting) -> Written:
    with Progress(release, "converting", contents.tensor_bytes) as progress:
        outcome = write_checkpoint(contents, path, durable=durable, lock_timeout=_LOCK_TIMEOUT, progress=progress)
    left = (f"could not remove {', '.join(outcome.leftovers)}",) if outcome.leftovers else ()
    return Written(outcome.direct, outcome.staging_bytes, engine_name(), (*outcome.notes, *left), outcome.shards)


def write_safetensors_file(output: Output, state: State) -> Written:
    """Writes one safetensors file; text metadata whose key no tensor has is kept."""
    names = {entry.name for entry in state.entries}
    texts = {name: value for name, value in output.origin.metadata.items() if isinstance(value, str)}
    kept = {name: value for name, value in texts.items() if name not in names and name not in ("format", CHECKSUM_KEY)}
    release = ReleaseWhileWriting(output.origin.mappings, output.tick)
    with NewFile(output.path, output.durable) as file:
        written = write_safetensors(file, state.entries, kept, output.durable, release)
    return written._replace(notes=(*written.notes, *_lost(output.origin, kept)))


def write_torch_file(output: Output, state: State) -> Written:
    """Writes one file that ``torch.load(weights_only=True)`` reads as a dict of tensors."""
    with NewFile(output.path, output.durable) as file:
        written = _write_torch(output, state, file)
    return written._replace(notes=(*written.notes, *_lost(output.origin, {})))


def _write_torch(output: Output, state: State, file: NewFile) -> Written:
    origin = output.origin
    if all(fits_torch(entry) for entry in state.entries if entry.tied_to is None):
        return write_torch(file, state.entries, ReleaseWhileWriting(origin.mappings, output.tick))
    # torch.save takes only tensors that lie in memory as they will lie in the file: they are first written to a checkpoint, and mapped.
    with ExitStack() as closing:
        try:
            contents = plan_contents(OnDisk(state), Parts(), sys.maxsize, {})
            _write_contents(contents, file.workspace, False, ReleaseWhileWriting(origin.mappings, lambda done: None))
            ready = open_origin(os.path.join(file.workspace, INDEX_NAME), None, lambda name: True, closing)
        except ShardSaveError as error:
            kind = OutOfSpaceError if isinstance(error, OutOfSpaceError) else SaveNotCommittedError
            raise kind(
                f"cannot write {file.path} by way of a directory beside it: {error}; what was at {file.path} is as it was"
            ) from error
        state = converted_state(ready, Names((), ()), None, file.workspace)
        return write_torch(file, state.entries, ReleaseWhileWriting(ready.mappings, output.tick))


def _lost(origin: Origin, kept: Mapping[str, str]) -> tuple[str, ...]:
    """Notes about what one file cannot hold."""
    lost = sorted(origin.metadata.keys() - kept.keys())
    flags = ("freeze flags were left out",) if origin.flags is not None else ()
    return (*flags, *((f"metadata was left out: {some(lost, 5)}",) if lost else ()))
