"""`convert`: from one kind of checkpoint to another, tensor by tensor; the whole model is never in memory."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Literal, Union

import torch

from shardsave._api.arguments import check_path, check_progress, check_switches, parse_size
from shardsave._api.findings import ConvertReport
from shardsave._api.operators import check_operators
from shardsave._api.reports import Phases, log_deletion
from shardsave._common.log_records import log_record
from shardsave._common.os_calls import absolute_path, kind_of
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._conversion.changes import Drop, Names, Rename, allowed_names, patterns, replacements
from shardsave._conversion.converted import carried_over, converted_state
from shardsave._conversion.open_origin import open_origin
from shardsave._conversion.origin import DROP_TRAINING, Origin, Request
from shardsave._conversion.outputs import Output, write_output
from shardsave._format.file_names import TORCH_ENDINGS
from shardsave._loading.read import Target, TensorReader
from shardsave._printable import printable
from shardsave._saving.casts import check_dtype
from shardsave._state.module import Entry
from shardsave._storage.directory import path_to_write
from shardsave.errors import SaveNotCommittedError

Form = Literal["shardsave", "safetensors", "torch"]


@uncompiled
@verb()
def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: Form = "shardsave",
    max_shard_size: Union[int, str] = "2GB",
    dtype: Union[torch.dtype, str, None] = None,
    drop: Drop = (),
    rename: Rename = (),
    key: str | None = None,
    allow: Union[str, Iterable[str]] = (),
    verify: bool = True,
    durable: bool = True,
    progress: ProgressArgument = None,
) -> ConvertReport:
    """Converts the checkpoint at ``source``, whoever wrote it, into one at ``destination``, which is replaced as a whole or not at all.

    Tensors stream from mapped files, so memory is bounded for models of every size. Pickles are read only by an unpickler of shardsave
    that creates tensors, containers and inert records: no code from a file runs, and nothing that it names is imported. Tied tensors
    stay tied. Freeze flags and metadata of shardsave's own checkpoints are kept; the flags of third-party files are unknown.

    Never collective: a rank that calls it waits for no other.

    Args:
        source: a checkpoint of shardsave; a safetensors file or index, or a directory with one, also from the hub's cache; a file of
            ``torch.save`` (``.bin``, ``.pt``, ``.pth``), or the index or directory of such shards; a directory of
            ``torch.distributed.checkpoint``, also of its safetensors files from several ranks.
        destination: a directory for ``to="shardsave"``, otherwise one file.
        to: ``"shardsave"``; ``"safetensors"``, one file for every reader; ``"torch"``, one file that
            ``torch.load(weights_only=True)`` reads as a plain ``state_dict``.
        max_shard_size: as in ``save``; only for ``to="shardsave"``.
        dtype: cast floating-point tensors to it, as ``Tensor.to`` does. Tensors of 8 or 4 bits are quantised and keep their dtype.
        drop: leave out what has a name, or a path of keys in its file, that matches one of these shell patterns (``"optimizer.*"``). One
            that is exactly a path of keys in the file means what is there, and no name elsewhere: ``"training"`` means the training
            state of a checkpoint that has one.
        rename: pairs of a regular expression and a replacement for each of its matches in a name, applied in this order.
        key: the path to the state in a file that holds other objects too (``"model"``, ``"trainer.ema"``); required if other tensors
            than training state are outside of it, and ``drop`` does not leave them out.
        allow: names of classes and functions, such as ``"my_code.Config"``, that the pickle of a file of ``torch.save`` may have. They
            are never imported or called: an object of such a class becomes a record that does nothing, and is left out.
        verify: compare the checksum of every tensor of the source with the stored one, if there is one, before anything is written.
        durable: as in ``save``.
        progress: as in ``save``.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        CheckpointNotFoundError, CorruptCheckpointError: nothing was written.
        UntrustedCodeError: a pickle names more than tensors, containers and usual values; none of it was run. The message lists the
            names for ``allow``.
        IncompatibleCheckpointError: it is not clear which tensors are meant; the message lists the choices.
        UnsupportedTensorError, and what ``save`` raises.

    Example:
        >>> import torch, shardsave
        >>> torch.save({"state_dict": torch.nn.Linear(4, 2).state_dict(), "epoch": 3}, "old.pt")
        >>> report = shardsave.convert("old.pt", "new", dtype="bfloat16", rename=[("^", "head.")])
        >>> shardsave.inspect("new").names
        ('head.weight', 'head.bias')
    """
    _check_arguments(source, destination, to, key)
    check_operators("convert", source, "nothing was written")
    check_switches(verify=verify, durable=durable)
    check_progress(progress)
    max_shard_bytes = parse_size(max_shard_size)
    names = Names(patterns(drop), replacements(rename))
    target, allowed = check_dtype(dtype), allowed_names(allow)
    source_path, destination_path = absolute_path(os.fspath(source)), path_to_write(os.fspath(destination))
    started = time.perf_counter()
    with ExitStack() as stack:
        request = Request(key, names.wanted, allowed, not names.drops_exactly(DROP_TRAINING))
        origin = open_origin(source_path, request, stack)
        _check_destination(source_path, destination_path, to, origin)
        state, casts = converted_state(origin, names, target, source_path)
        carried = carried_over(origin, names, target, to_directory=to == "shardsave")
        bytes_to_write = _bytes_of([*state.entries, *carried.entries])
        bytes_to_verify = sum(t.nbytes for t in origin.stored) if verify else 0
        with Progress(progress, "converting", bytes_to_verify + bytes_to_write) as reporter:
            verified = _verify(origin, reporter) if verify else False
            planned = time.perf_counter()
            result = write_output(Output(destination_path, origin, durable, reporter.tick), to, state, carried, max_shard_bytes)
    ended = time.perf_counter()
    stored = [entry for entry in state.entries if entry.tied_to is None]
    report = ConvertReport(
        path=os.fspath(destination),
        bytes=_bytes_of(state.entries),
        tensors=len(stored),
        shards=result.shards,
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=ended - planned),
        engine=result.engine,
        direct=result.direct,
        staging_bytes=result.staging_bytes,
        pinned=False,
        notes=tuple(dict.fromkeys([*origin.notes, *names.notes(), *allowed.notes(), *carried.notes, *result.notes])),
        source=os.fspath(source),
        kind=origin.kind,
        to=to,
        durable=durable,
        verified=verified,
        cast=casts,
        dropped=origin.dropped,
        renamed=tuple(names.renamed),
        ties={entry.name: entry.tied_to for entry in state.entries if entry.tied_to is not None},
        flags_known=state.flags_known,
        removed=result.removed,
    )
    log_record("convert", report, matters=bool(result.leftovers or result.warned))
    log_deletion(report.path, result.removed, result.leftovers)
    return report


def _check_arguments(source: object, destination: object, to: object, key: object) -> None:
    check_path(source)
    check_path(destination)
    if to not in ("shardsave", "safetensors", "torch"):
        raise ValueError(f"to must be 'shardsave', 'safetensors' or 'torch', not {to!r}")
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key must be a string, not {type(key).__name__}")


def _bytes_of(entries: Sequence[Entry]) -> int:
    """The bytes that ``entries`` will have in the file; a tied group counts once."""
    return sum(entry.source.nbytes for entry in entries if entry.tied_to is None)


def _verify(origin: Origin, reporter: Progress) -> bool | None:
    """Verifies the source before it is written with new checksums, which would hide damage. None if it has no checksums."""
    if not origin.stored or origin.checkpoint is None:
        return None
    targets: list[Target] = [(located, None) for located in origin.stored]
    TensorReader(origin.checkpoint, verify=True, progress=reporter).read(targets)
    return True


_FILE_ENDINGS = (".safetensors", *TORCH_ENDINGS)


def _check_destination(source: str, destination: str, to: Form, origin: Origin) -> None:
    """Refuses a destination that overlaps the source, or that exists as another kind of file than the one that ``to`` writes."""
    if to == "shardsave" and destination.endswith(_FILE_ENDINGS) and not os.path.isdir(destination):
        form = "safetensors" if destination.endswith(".safetensors") else "torch"
        raise ValueError(
            f"cannot convert to {printable(destination)}: a directory was expected, this is the name of a file; pass to={form!r} "
            f"to write one; nothing was written"
        )
    source_path, destination_path = os.path.realpath(source), os.path.realpath(destination)
    expectation = f"cannot convert {printable(source)} to {printable(destination)}: two separate paths were expected"
    if source_path == destination_path or any(_same_file(file, destination) for file in origin.files):
        raise ValueError(f"{expectation}, they are the same; nothing was written")
    if destination_path.startswith(source_path.rstrip("/") + "/") or source_path.startswith(destination_path.rstrip("/") + "/"):
        raise ValueError(f"{expectation}, one is inside the other; nothing was written")
    try:
        mode = os.stat(destination).st_mode if to == "shardsave" else os.lstat(destination).st_mode
    except OSError:
        return
    kind, is_expected_kind = ("a directory", stat.S_ISDIR) if to == "shardsave" else ("a regular file", stat.S_ISREG)
    if not is_expected_kind(mode):
        raise SaveNotCommittedError(
            f"cannot convert to {destination}: {kind}, or nothing, was expected, it is a {kind_of(mode)}; "
            f"nothing was written, existing files are unchanged"
        )


def _same_file(left: str, right: str) -> bool:
    try:
        return os.path.samefile(left, right)
    except OSError:
        return False
