"""`inspect` and `verify`: what a checkpoint holds, and whether it still does."""

from __future__ import annotations

import os
import time

from shardsave._arguments import check_path, check_progress
from shardsave._backend import engine_name
from shardsave._checkpoint import PARTS, open_checkpoint
from shardsave._dtypes import BY_NAME, torch_shape
from shardsave._ending import verb
from shardsave._progress import Progress, ProgressArgument
from shardsave._read import ReadTotals, Target, read_tensors
from shardsave._reports import CheckpointInfo, Phases, TensorInfo, VerifyReport


@verb()
def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What the checkpoint at ``path`` holds: names, shapes, dtypes, shards, freeze flags, ties and metadata.

    Reads the index and the headers, no tensor data. Raises CheckpointNotFoundError, CorruptCheckpointError,
    IncompatibleCheckpointError, DirectoryBusyError.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save(torch.nn.Linear(4, 2).requires_grad_(False), "frozen-linear")
        >>> sorted(shardsave.inspect("frozen-linear").frozen)
        ['bias', 'weight']
    """
    check_path(path)
    with open_checkpoint(path) as checkpoint:
        tensors = {}
        for name in checkpoint.stored_names:
            t = checkpoint.tensors[name]
            tensors[name] = TensorInfo(BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape), t.nbytes, t.shard)
        total = sum(info.nbytes for info in tensors.values())
        tensors.update({name: tensors[stored] for name, stored in checkpoint.ties.items()})
        flags = checkpoint.flags
        return CheckpointInfo(
            path=os.fspath(path),
            bytes=total,
            shards=checkpoint.shards,
            tensors=tensors,
            parameters=frozenset(flags) if flags is not None else None,
            frozen=frozenset(name for name, frozen in flags.items() if frozen) if flags is not None else None,
            ties=dict(checkpoint.ties),
            metadata=dict(checkpoint.metadata),
            durable=checkpoint.record.durable if checkpoint.record is not None else None,
            parts={role: part.file for role, part in checkpoint.record.parts.items()} if checkpoint.record is not None else {},
        )


@verb()
def verify(path: str | os.PathLike[str], *, progress: ProgressArgument = None) -> VerifyReport:
    """Reads every byte of the checkpoint at ``path`` and compares it with the stored checksums; fills no tensor.

    Raises CorruptCheckpointError that names what is damaged, and otherwise as `inspect` does.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.ones(3)}, "three-ones")
        >>> shardsave.verify("three-ones").verified
        True
    """
    check_path(path)
    check_progress(progress)
    started = time.perf_counter()
    with open_checkpoint(path, parts=PARTS) as checkpoint:
        targets = [Target(located, None) for located in (*checkpoint.tensors.values(), *checkpoint.kept.values())]
        planned = time.perf_counter()
        totals = ReadTotals()
        with Progress(progress, "verifying", sum(target.located.nbytes for target in targets)) as shown:
            read_tensors(checkpoint, targets, verify=True, progress=shown, totals=totals)
        shards = len(checkpoint.shards)
    ended = time.perf_counter()
    return VerifyReport(
        path=os.fspath(path),
        bytes=totals.bytes,
        tensors=totals.tensors,
        shards=shards,
        seconds=ended - started,
        phases=Phases(plan=planned - started, transfer=ended - planned),
        engine=engine_name(),
        direct=totals.direct,
        staging_bytes=totals.staging_bytes,
        pinned=totals.pinned,
        notes=totals.notes,
        verified=totals.verified,
    )
