"""`convert`: from one kind of checkpoint to another, tensor by tensor, never with the whole model in memory."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, Union

import torch

from shardsave._api.arguments import check_path, check_progress, check_switches, parse_size
from shardsave._api.findings import ConvertReport
from shardsave._api.reports import Phases
from shardsave._common.os_calls import kind_of
from shardsave._common.progress import Progress, ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._conversion.changes import Drop, Names, Rename, check_dtype, patterns, replacements
from shardsave._conversion.converted import carried_over, converted_state
from shardsave._conversion.origin import Origin, open_origin
from shardsave._conversion.outputs import Output, write_directory, write_safetensors_file, write_torch_file
from shardsave._format.file_names import TORCH_ENDINGS
from shardsave._loading.read import Target, TensorReader
from shardsave._state.module import Entry
from shardsave.errors import SaveNotCommittedError

Form = Literal["shardsave", "safetensors", "torch"]


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
    bound = parse_size(max_shard_size)
    names = Names(patterns(drop), replacements(rename))
    target = check_dtype(dtype)
    read_from, write_to = os.fspath(source), os.fspath(destination)
    started = time.perf_counter()
    with ExitStack() as closing:
        origin = open_origin(read_from, key, names.wanted, closing)
        _check_destination(read_from, write_to, to, origin)
        state = converted_state(origin, names, target, read_from)
        carried = carried_over(origin, names, target, to_directory=to == "shardsave")
        total = _bytes_of([*state.entries, *carried.parts.extra])
        checked = sum(t.nbytes for t in origin.stored) if verify else 0
        with Progress(progress, "converting", checked + total) as shown:
            verified = _verify(origin, verify, shown)
            planned = time.perf_counter()
            output = Output(write_to, origin, durable, shown.tick)
            if to == "shardsave":
                written = write_directory(output, state, carried, bound)
            else:
                written = (write_safetensors_file if to == "safetensors" else write_torch_file)(output, state)
    ended = time.perf_counter()
    stored = [entry for entry in state.entries if entry.tied_to is None]
    return ConvertReport(
        path=write_to,
        bytes=total,
        tensors=len(stored),
        shards=written.shards,
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=ended - planned),
        engine=written.engine,
        direct=written.direct,
        staging_bytes=written.staging_bytes,
        pinned=False,
        notes=tuple(dict.fromkeys([*origin.notes, *names.notes(), *carried.notes, *written.notes])),
        source=read_from,
        kind=origin.kind,
        to=to,
        durable=durable,
        verified=verified,
        cast=sum(entry.cast is not None for entry in stored),
        dropped=tuple(names.dropped),
        renamed=tuple(names.renamed),
        ties={entry.name: entry.tied_to for entry in state.entries if entry.tied_to is not None},
        flags_known=state.flags_known,
    )


def _bytes_of(entries: Sequence[Entry]) -> int:
    return sum(entry.tensor.numel() * (entry.cast or entry.tensor.dtype).itemsize for entry in entries if entry.tied_to is None)


def _verify(origin: Origin, wanted: bool, shown: Progress) -> bool | None:
    """Reads what has checksums once, before the new checkpoint gets checksums of its own, which would hide what is damaged."""
    if not wanted:
        return False
    if not origin.stored or origin.checkpoint is None:
        return None
    targets: list[Target] = [(located, None) for located in origin.stored]
    TensorReader(origin.checkpoint, verify=True, progress=shown).read(targets)
    return True


_FILE_ENDINGS = (".safetensors", *TORCH_ENDINGS)


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
