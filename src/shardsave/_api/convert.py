"""`convert`: from one kind of checkpoint to another, tensor by tensor, never with the whole model in memory."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from mmap import mmap
from typing import Any, Literal, Union

import torch

from shardsave._api.arguments import check_path, check_progress, check_switches, parse_size
from shardsave._api.findings import ConvertReport
from shardsave._api.reports import Phases
from shardsave._api.save import save
from shardsave._common.assembled import Assembled, Part
from shardsave._common.os_calls import kind_of
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._conversion.changes import Drop, Names, Rename, cast_of, check_dtype, patterns, replacements
from shardsave._conversion.single_file import NewFile, Written, fits_torch, write_safetensors, write_torch
from shardsave._foreign.sources import Origin, open_origin
from shardsave._format.header import CHECKSUM_KEY
from shardsave._format.index import INDEX_NAME
from shardsave._loading.mapped import let_go
from shardsave._loading.read import ReadTotals, Target, read_tensors
from shardsave._state.module import Beside, Entry, State, read_state
from shardsave._state.savable import check_savable
from shardsave.errors import IncompatibleCheckpointError, OutOfSpaceError, SaveNotCommittedError, ShardSaveError

Form = Literal["shardsave", "safetensors", "torch"]

#: After so many bytes of the new checkpoint what has been read of the mapped files is let go: a cast may read four times as many.
_HELD_BYTES = 16 << 20


@verb()
def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Form = "shardsave",
    max_shard_size: Union[int, str] = "5GB",
    dtype: Union[torch.dtype, str, None] = None,
    drop: Drop = (),
    rename: Rename = (),
    key: str | None = None,
    verify: bool = True,
    durable: bool = True,
    progress: ProgressArgument = None,
) -> ConvertReport:
    """Converts the checkpoint at ``source``, whoever wrote it, into one at ``destination``, which is replaced as a whole or not at all.

    Tensors stream from mapped files, so memory is bounded whatever the model's size. Pickle is read by ``torch.load``'s restricted
    unpickler alone (and the table of a distributed checkpoint by one of our own that makes nothing but records): no code of a file
    runs. Tied tensors stay tied. Freeze flags and metadata of our own checkpoints come along; of others, flags are unknown.

    Args:
        source: a checkpoint of ours; a safetensors file or index, or a directory with one, also of the hub's cache; a file of
            ``torch.save`` (``.bin``, ``.pt``, ``.pth``), or the index or directory of such shards; a directory of
            ``torch.distributed.checkpoint``.
        destination: a directory for ``to="shardsave"``, else one file.
        to: ``"shardsave"``; ``"safetensors"``, one file for every reader; ``"torch"``, one that
            ``torch.load(weights_only=True)`` reads as a plain ``state_dict``.
        max_shard_size: as in ``save``; for ``to="shardsave"``.
        dtype: cast floating tensors to it, as ``Tensor.to`` does. Those of 8 and 4 bits are quantised and stay as they are.
        drop: leave out names of the source that match one of these shell patterns (``"optimizer.*"``).
        rename: pairs of a regular expression and what replaces each of its matches in a name, one after the other.
        key: where the state lies in a file that holds more (``"model"``, ``"trainer.ema"``); needed where there are several.
        verify: check the source's tensors against their stored checksums, where it has them, before anything is written.
        durable, progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError, CorruptCheckpointError: nothing was written.
        UntrustedCodeError: a pickle asks for more than tensors and containers; nothing of it was run.
        IncompatibleCheckpointError: it is not clear which tensors are meant; the message lists the choices.
        UnsupportedTensorError, and what ``save`` raises.

    Example:
        >>> import torch, shardsave
        >>> torch.save({"state_dict": torch.nn.Linear(4, 2).state_dict(), "epoch": 3}, "old.pt")
        >>> report = shardsave.convert("old.pt", "new", dtype="bfloat16", rename=[("^", "head.")])
        >>> shardsave.inspect("new").names
        ('head.weight', 'head.bias')
    """
    check_path(source)
    check_path(destination)
    check_switches(verify=verify, durable=durable)
    check_progress(progress)
    if to not in ("shardsave", "safetensors", "torch"):
        raise ValueError(f"to must be 'shardsave', 'safetensors' or 'torch', not {to!r}")
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key must be a string, not {type(key).__name__}")
    parse_size(max_shard_size)
    names = Names(patterns(drop), replacements(rename))
    target = check_dtype(dtype)
    read_from, write_to = os.fspath(source), os.fspath(destination)
    started = time.perf_counter()
    with ExitStack() as closing:
        origin = open_origin(read_from, key, names.wanted, closing)
        _check_destination(read_from, write_to, to, origin)
        state, cast = _state(origin, names, target, read_from)
        beside, left_out = _beside(origin, names, to, target)
        if to == "shardsave":
            state = state._replace(beside=beside)
        total = _bytes_of(state)
        checked = sum(t.nbytes for t in origin.stored) if verify else 0
        with Progress(progress, "converting", checked + total) as shown:
            verified = _verify(origin, verify, shown)
            planned = time.perf_counter()
            writer = _Writer(write_to, origin, shown, durable, max_shard_size)
            written = {"shardsave": writer.directory, "safetensors": writer.safetensors, "torch": writer.torch}[to](state)
    ended = time.perf_counter()
    stored = [entry for entry in state.entries if entry.tied_to is None]
    return ConvertReport(
        path=write_to,
        bytes=total,
        tensors=len(stored),
        shards=writer.shards,
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=ended - planned),
        engine=written.engine,
        direct=written.direct,
        staging_bytes=written.staging_bytes,
        pinned=False,
        notes=tuple(dict.fromkeys([*origin.notes, *names.notes(), *left_out, *written.notes])),
        source=read_from,
        kind=origin.kind,
        to=to,
        durable=durable,
        verified=verified,
        cast=cast,
        dropped=tuple(names.dropped),
        renamed=tuple(names.renamed),
        ties={entry.name: entry.tied_to for entry in state.entries if entry.tied_to is not None},
        flags_known=state.flags_known,
    )


def _state(origin: Origin, names: Names, target: torch.dtype | None, path: str) -> tuple[State, int]:
    """What is to be stored, under new names and with the dtypes that it is to have; and how many stored tensors are cast."""
    named: dict[str, Any] = {}
    old_of: dict[str, str] = {}
    for old, value in origin.values.items():
        new = names.new(old)
        if new in old_of:
            raise IncompatibleCheckpointError(
                f"cannot convert {path}: a new name for each tensor was expected, {old_of[new]!r} and {old!r} would both be {new!r}; "
                f"nothing was written"
            )
        named[new], old_of[new] = value, old
    if not named:
        raise IncompatibleCheckpointError(
            f"cannot convert {path}: at least one tensor was expected, none is left; nothing was written"
        )
    whole = read_state({name: value for name, value in named.items() if not isinstance(value, Assembled)})
    entries = {entry.name: entry for entry in whole.entries}
    for name, value in named.items():
        if isinstance(value, Assembled):
            check_savable(name, torch.empty(0, dtype=value.dtype))
            entries[name] = Entry(name, "tensor", None, None, value)
    flags = origin.flags or {}
    reading = _Reading(origin.mappings)
    made, casts = [], 0
    for name in named:
        entry, frozen = entries[name], flags.get(old_of[name])
        kind: Literal["parameter", "tensor"] = "tensor" if frozen is None else "parameter"
        source, cast = entry.source, cast_of(entry, target)
        if cast is not None:
            casts += entry.tied_to is None
            parts = source.parts if isinstance(source, Assembled) else [Part((0,) * entry.tensor.dim(), entry.tensor)]
            # A cast may read faster than progress is told: so what was read is let go as it goes along.
            source = Assembled(cast, source.shape, parts, reading)
        made.append(entry._replace(frozen=frozen, kind=kind, source=source))
    return State(tuple(made), origin.flags is not None, whole.overlaps), casts


def _beside(origin: Origin, names: Names, to: Form, target: torch.dtype | None) -> tuple[Beside, tuple[str, ...]]:
    """What comes along beside the weights, and a note of what does not: an architecture and a program go by the names and dtypes saved."""
    beside, changed = origin.beside, bool(names.dropped or names.renamed)
    if target is not None:
        beside = beside._replace(companions={name: _with_dtype(data, target) for name, data in beside.companions.items()})
    if to == "shardsave" and not changed and target is None:
        return beside, ()
    left = sorted(beside.documents)
    why = "one file has no place for it" if to != "shardsave" else "it goes by the names and dtypes that were saved"
    notes = tuple(f"the {part} was left out: {why}" for part in left)
    return Beside(companions=beside.companions, module_flags=None if changed else beside.module_flags), notes


def _with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """A transformers config in which weights of another dtype are expected; as it is, where it is none that says so."""
    try:
        made = json.loads(config)
    except (ValueError, RecursionError):
        return config
    told = [key for key in ("dtype", "torch_dtype") if isinstance(made, dict) and isinstance(made.get(key), str)]
    if not told:
        return config
    made.update(dict.fromkeys(told, str(dtype).removeprefix("torch.")))
    return f"{json.dumps(made, indent=2)}\n".encode()


def _bytes_of(state: State) -> int:
    stored = [*(entry for entry in state.entries if entry.tied_to is None), *state.beside.extra]
    return sum(entry.source.nbytes for entry in stored)


def _verify(origin: Origin, wanted: bool, shown: Progress) -> bool | None:
    """Reads what has checksums once, before the new checkpoint gets checksums of its own, which would hide what is damaged."""
    if not wanted:
        return False
    if not origin.stored or origin.checkpoint is None:
        return None
    targets: list[Target] = [(located, None) for located in origin.stored]
    read_tensors(origin.checkpoint, targets, verify=True, progress=shown, totals=ReadTotals())
    return True


class _Writer:
    """The three things that a state can be made into."""

    def __init__(self, path: str, origin: Origin, shown: Progress, durable: bool, max_shard_size: Union[int, str]) -> None:
        self.shards = 1
        self._path, self._origin, self._shown = path, origin, shown
        self._durable, self._max_shard_size = durable, max_shard_size

    def directory(self, state: State) -> Written:
        report = save(
            state,
            self._path,
            max_shard_size=self._max_shard_size,
            durable=self._durable,
            metadata=self._origin.metadata,
            progress=_LettingGo(self._origin.mappings, self._shown.tick),
        )
        self.shards = report.shards
        left = (f"could not remove {', '.join(report.leftovers)}",) if report.leftovers else ()
        return Written(report.direct, report.staging_bytes, report.engine, (*report.notes, *left))

    def safetensors(self, state: State) -> Written:
        names = {entry.name for entry in state.entries}
        told = {name: value for name, value in self._origin.metadata.items() if isinstance(value, str)}
        kept = {name: value for name, value in told.items() if name not in names and name not in ("format", CHECKSUM_KEY)}
        tick = _LettingGo(self._origin.mappings, self._shown.tick)
        with NewFile(self._path, self._durable) as new:
            written = write_safetensors(new, state.entries, kept, self._durable, tick)
        return written._replace(notes=(*written.notes, *self._lost(kept)))

    def torch(self, state: State) -> Written:
        with NewFile(self._path, self._durable) as new:
            written = self._torch(state, new)
        return written._replace(notes=(*written.notes, *self._lost({})))

    def _torch(self, state: State, new: NewFile) -> Written:
        if all(fits_torch(entry) for entry in state.entries if entry.tied_to is None):
            return write_torch(new, state.entries, _LettingGo(self._origin.mappings, self._shown.tick))
        # torch.save takes tensors that lie in memory as they are to lie in the file: these are put into a file first, and mapped.
        quiet = _LettingGo(self._origin.mappings, lambda done: None)
        with ExitStack() as closing:
            try:
                save(state, new.workspace, max_shard_size=sys.maxsize, durable=False, progress=quiet)
                ready = open_origin(os.path.join(new.workspace, INDEX_NAME), None, lambda name: True, closing)
            except ShardSaveError as error:
                kind = OutOfSpaceError if isinstance(error, OutOfSpaceError) else SaveNotCommittedError
                raise kind(
                    f"cannot write {new.path} by way of a directory beside it: {error}; what was at {new.path} is as it was"
                ) from error
            again, _ = _state(ready, Names((), ()), None, new.workspace)
            return write_torch(new, again.entries, _LettingGo(ready.mappings, self._shown.tick))

    def _lost(self, kept: Mapping[str, str]) -> tuple[str, ...]:
        """What one file has no place for."""
        lost = sorted(self._origin.metadata.keys() - kept.keys())
        flags = ("freeze flags were left out",) if self._origin.flags is not None else ()
        return (*flags, *((f"metadata was left out: {', '.join(lost[:5])}",) if lost else ()))


class _Reading:
    """Told of bytes that were read, gives back now and then the memory of the mapped files that they came from."""

    def __init__(self, mappings: tuple[mmap, ...]) -> None:
        self._mappings, self._held = mappings, 0

    def __call__(self, count: int) -> None:
        self._held += count
        if self._held >= 4 * _HELD_BYTES:
            self._held = 0
            let_go(self._mappings)


class _LettingGo:
    """Told how many bytes are done, gives back now and then the memory of what was read from mapped files, and tells on."""

    def __init__(self, mappings: tuple[mmap, ...], tell: Callable[[int], object]) -> None:
        self._mappings, self._tell, self._at = mappings, tell, 0

    def __call__(self, done: int, total: int = 0) -> None:
        if done - self._at >= _HELD_BYTES:
            let_go(self._mappings)
            self._at = done
        self._tell(done)


_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


def _check_destination(source: str, destination: str, to: Form, origin: Origin) -> None:
    """Refuses to write over the source, or over what is of another kind than that which is to be made."""
    if to == "shardsave" and destination.endswith(_FILE_ENDINGS) and not os.path.isdir(destination):
        form = "safetensors" if destination.endswith(".safetensors") else "torch"
        raise ValueError(
            f"cannot convert to {destination}: a directory was expected, that is the name of a file; say to={form!r} for one; "
            f"nothing was written"
        )
    read_from, write_to = os.path.realpath(source), os.path.realpath(destination)
    apart = f"cannot convert {source} to {destination}: two places apart from each other were expected"
    if read_from == write_to or any(_same(file, destination) for file in origin.files):
        raise ValueError(f"{apart}, they are one; nothing was written")
    if write_to.startswith(read_from.rstrip("/") + "/") or read_from.startswith(write_to.rstrip("/") + "/"):
        raise ValueError(f"{apart}, one lies inside of the other; nothing was written")
    try:
        mode = os.stat(destination).st_mode if to == "shardsave" else os.lstat(destination).st_mode
    except OSError:
        return
    wanted, fits = ("a directory", stat.S_ISDIR) if to == "shardsave" else ("a regular file", stat.S_ISREG)
    if not fits(mode):
        raise SaveNotCommittedError(
            f"cannot convert to {destination}: {wanted}, or nothing, was expected, it is a {kind_of(mode)}; "
            f"nothing was written, what is there is as it was"
        )


def _same(left: str, right: str) -> bool:
    try:
        return os.path.samefile(left, right)
    except OSError:
        return False
