"""`save_async`: a save beside a training that goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

import torch

from shardsave._api.arguments import pick
from shardsave._api.background import InBackground, StagingArgument, start
from shardsave._api.pending_save import PendingSave
from shardsave._api.save import How
from shardsave._api.save_contents import What
from shardsave._background.turns import IfBusy
from shardsave._common.progress import ProgressArgument
from shardsave._common.uncompiled import uncompiled
from shardsave._state.module import Source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._program.capture import Program


@uncompiled
def save_async(
    source: Source,
    directory: str | os.PathLike[str],
    *,
    staging: StagingArgument = "auto",
    if_busy: IfBusy = "wait",
    check_unchanged: bool = False,
    background_workers: int = 1,
    step_timeout: float = 600.0,
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
) -> PendingSave:
    """Saves as `save` does, but returns as soon as training may go on. The checkpoint is of the moment of the call.

    Names, flags, ties, metadata, plain values and small tensors are read in the call, and so are buffers and everything that no hook
    guards. How the rest is taken is up to ``staging``. The call raises for wrong arguments and for what cannot be saved; what fails later
    raises nothing in the training: `PendingSave.wait` raises it, `PendingSave.exception` returns it, it is logged once, and the next
    save has it in its notes.

    A process has one such save in flight. When the process ends, it waits for it; a second Ctrl-C then gives it up.

    Args:
        source, directory: as in `save`.
        staging: "snapshot" copies all tensors to host memory in the call; that memory is kept for the next save. "ring" takes Parameters
            and the state of optimizers from where they are, while training goes on: the next step of each optimizer in ``training``
            waits until its parameters were taken, and what no optimizer holds. "auto" takes the ring only if optimizers in ``training``
            own every trainable Parameter, none is capturable, and there is one process; else a snapshot, and where that does
            not fit, it saves before it returns.
        if_busy: what to do if another save is in flight: "wait" for its end, "raise" a DirectoryBusyError, or "skip" this save.
        check_unchanged: also compare checksums from the call with what was saved: it finds changes that no hook sees, for one more read
            of the memory in the call.
        background_workers: the most threads that copy at one time after the call; more may wait for the disk.
        step_timeout: how many seconds a step of an optimizer waits for the save; after that the save fails, and training goes on.
        progress: as in `save`, but None shows no bar; a callable is called on the saving thread.
        reuse: as in `save`. With the ring, only shards that are frozen throughout are taken over.
        max_shard_size, durable, metadata, step, metrics, training, rng, process_group, architecture, program, adapter_only, only, dtype,
            lock_timeout, recheck_every, assume_frozen_unchanged, rank_timeout, phase_timeout, on_divergence: as in `save`.

    Collective:
        With a ``process_group``, or with DTensors, as `save`. Each rank copies its own part in the call (``staging="ring"`` is refused);
        the rest happens on threads, and a next collective call over the same group may be made at once. An error or the loss of one rank
        ends the save on all, in `PendingSave.wait`; `PendingSave.cancel` on one rank cancels it on all. ``if_busy`` is the same on all
        ranks, and "raise" and "skip" do on all what is right on rank 0.

    Raises:
        TypeError, ValueError: for wrong arguments, before anything happens.
        UnsupportedTensorError, UnsupportedTrainingError, UnsupportedModuleError: as in `save`.
        DirectoryBusyError: another save is in flight, and ``if_busy="raise"``, or it could not go on while this one waits.
        OutOfMemoryError: with ``staging="snapshot"``, the copy does not fit in memory.

    Example:
        >>> import torch, shardsave
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> pending = shardsave.save_async(model, "background-checkpoint", training={"optimizer": optimizer})
        >>> optimizer.step()  # training goes on
        >>> pending.wait().tensors
        2
    """
    return start(source, directory, pick(What, locals()), pick(How, locals()), pick(InBackground, locals()))
