"""`plan_save`: what a save would write and need, without writing anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

import torch

from shardsave._api.arguments import check_path, pick
from shardsave._api.operators import check_operators
from shardsave._api.reports import Printed
from shardsave._api.save import How, check_values, job_of
from shardsave._api.save_contents import What, attempted, plan
from shardsave._api.save_jobs import check_digests
from shardsave._common.free_memory import free_memory
from shardsave._common.progress import ProgressArgument
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.words import count, human_bytes
from shardsave._printable import printable
from shardsave._saving.plan import PlannedFile, free_bytes, planned_files, reserved_bytes, staging_bytes
from shardsave._state.module import Source
from shardsave._storage.directory import path_to_write

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._program.capture import Program

__all__ = ["PlannedFile", "SavePlan", "plan_save"]


@dataclass(frozen=True)
class SavePlan(Printed):
    """What a save would write and need. All numbers are bytes, unless they are counts.

    ``files``: every file with its length; in a name, ``????????`` stands for random digits. ``bytes``: tensor data of the weights.
    ``disk_bytes``: all files together. ``needed_bytes``: what must be free on disk when the save begins, whatever it replaces;
    ``free_bytes``: what is; None if the file system does not know it. ``memory_bytes``: the most that the save takes on the host, for
    staging and copies; ``free_memory``: what is free there, an estimate; None if the system does not say. ``keep_bytes``: what
    ``keep_last`` such checkpoints need in all, with the next one that is written before the oldest is removed; None without ``keep_last``.
    ``training_bytes``, ``cast``, ``left_out``, ``notes``: as in the SaveReport.
    """

    path: str
    files: tuple[PlannedFile, ...]
    bytes: int
    tensors: int
    shards: int
    disk_bytes: int
    needed_bytes: int
    free_bytes: int | None
    memory_bytes: int
    free_memory: int | None
    keep_last: int | None = None
    keep_bytes: int | None = None
    cast: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    training_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def fits(self) -> bool | None:
        """Whether the disk has room for the save now; None if the file system does not say."""
        return None if self.free_bytes is None else self.needed_bytes <= self.free_bytes

    def _lines(self) -> Iterator[str]:
        free = "unknown" if self.free_bytes is None else human_bytes(self.free_bytes)
        verdict = {True: "fits", False: "does not fit", None: "may fit"}[self.fits]
        yield (
            f"{self.path}: {human_bytes(self.disk_bytes)} on disk, {count(self.tensors, 'tensor')} in {count(self.shards, 'shard')}; "
            f"needs {human_bytes(self.needed_bytes)}, free {free}: {verdict}"
        )
        memory = "unknown" if self.free_memory is None else human_bytes(self.free_memory)
        yield f"  memory on the host: at most {human_bytes(self.memory_bytes)}, free {memory}"
        if self.keep_bytes is not None:
            yield f"  keep_last={self.keep_last}: {human_bytes(self.keep_bytes)} in all"
        if self.training_bytes:
            yield f"  training state: {human_bytes(self.training_bytes)}"
        yield from (f"  {file.name}: {human_bytes(file.bytes)}" for file in self.files)
        yield from (f"  {note}" for note in self.notes)


@uncompiled
@verb()
def plan_save(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    keep_last: int | None = None,
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
    reuse: Union[str, os.PathLike[str], Literal[False], None] = None,
    assume_frozen_unchanged: bool = False,
    recheck_every: int = 10,
    progress: ProgressArgument = None,
    lock_timeout: float = 600.0,
    rank_timeout: float = 120.0,
    phase_timeout: float = 1800.0,
    on_divergence: Literal["raise", "lowest_rank"] = "raise",
) -> SavePlan:
    """Computes what ``save`` with the same arguments would write into ``directory`` now, and what it needs. Writes nothing.

    It reads which names are taken in the directory, and no tensor. So it does not know which shards `save` can take over from an earlier
    checkpoint: all numbers are those of a save that writes everything, the most that can be needed. A save may also differ because other
    processes write and delete.

    Args:
        source, directory, and all other arguments: as in ``save``; ``progress`` and ``lock_timeout`` have no effect.
        keep_last: also compute the disk space for so many checkpoints of this size.

    Collective:
        With a ``process_group``, or with DTensors, as `save`. All ranks learn of the same files, and each of its own memory.

    Raises:
        TypeError, ValueError, UnsupportedTensorError, UnsupportedModuleError: what ``save`` would raise for what cannot be saved.
        SaveNotCommittedError: the directory cannot be one, or cannot be opened.

    Example:
        >>> import torch, shardsave
        >>> plan = shardsave.plan_save(torch.nn.Linear(4, 2), "planned", keep_last=3)
        >>> [file.name for file in plan.files], plan.bytes, plan.fits
        (['model-00001-of-00001.safetensors', 'model.safetensors.index.json'], 40, True)
        >>> plan.keep_bytes == 4 * plan.disk_bytes
        True
    """
    what, how = pick(What, locals()), pick(How, locals())
    with job_of(source, directory, what, how, verb="plan to save to") as job:
        path, own = attempted(source, what, job, lambda: _checked_path(directory, how, keep_last))
        planned = plan(source, what, own, job)
        check_digests(planned.contents, job, {**planned.options, "durable": durable})
        contents = job.complete(planned.contents)
    files = planned_files(contents, path, durable=durable)
    disk_bytes = sum(file.bytes for file in files)
    memory = free_memory()
    return SavePlan(
        path=os.fspath(directory),
        files=tuple(files),
        bytes=contents.weight_bytes,
        tensors=sum(len(shard.layout.tensors) for shard in contents.shards),
        shards=len(contents.shards),
        disk_bytes=disk_bytes,
        needed_bytes=reserved_bytes(contents, files),
        free_bytes=free_bytes(path),
        memory_bytes=staging_bytes(contents) + contents.copied_bytes,
        free_memory=memory.bytes if memory is not None else None,
        keep_last=keep_last,
        keep_bytes=(keep_last + 1) * disk_bytes if keep_last is not None else None,
        cast=planned.cast,
        left_out=planned.left_out,
        notes=contents.notes,
        training_bytes=sum(file.bytes for file in files if "/" in file.name),
    )


def _checked_path(directory: str | os.PathLike[str], how: How, keep_last: int | None) -> str:
    """Checks the arguments that are not about what is saved; returns the absolute path. Raises TypeError, ValueError."""
    check_path(directory)
    check_operators("plan to save to", directory, "nothing was written")
    path = path_to_write(os.fspath(directory))
    check_values(how)
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise ValueError(f"keep_last must be a number of checkpoints, 1 or more, not {keep_last!r}")
    return path
