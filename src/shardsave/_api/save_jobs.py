"""Which processes save together, and what must be equal on all of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed

from shardsave._api.process_group import collective_group
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT, seconds
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._saving.contents import Contents
from shardsave._saving.job import ALONE, Job
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._state.module import Source


@contextmanager
def job_of_save(
    source: Source,
    directory: str | os.PathLike[str],
    process_group: ProcessGroup | None,
    training: Any = None,
    *,
    durable: bool,
    rank_timeout: float,
    phase_timeout: float,
    on_divergence: Literal["raise", "lowest_rank"],
    verb: str = "save to",
    apart: str = "",
) -> Iterator[Job]:
    """Meets the other ranks if the save is collective. What one of them raises within the context is raised on all.

    ``training``: a training state that is saved too. ``verb``: what the call does, for messages. ``apart``: a word for saves that may run
    beside others.
    Raises TypeError, ValueError for a wrong ``process_group``, and ShardSaveError if a rank does not come.
    """
    group = collective_group(source, process_group, training)
    del source, training  # a save in the background must not keep the model alive
    if group is None:
        yield ALONE
        return
    import_at_use("shardsave._ranks.save_job")  # most saves are by one process
    from shardsave._ranks.begin import session_of
    from shardsave._ranks.save_job import SaveJob

    where = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else repr(directory)
    session = session_of(
        group,
        verb,
        where,
        rank_timeout=seconds(rank_timeout, RANK_TIMEOUT),
        phase_timeout=seconds(phase_timeout, PHASE_TIMEOUT),
        apart=apart,
        raises=SaveNotCommittedError,
        state="; nothing was committed",
    )
    with session as met:
        yield SaveJob(met, met.names, where, durable=durable, on_divergence=on_divergence)


def beside_other_ranks(job: Job, path: str, step: Any) -> Job:
    """``job`` or, for one process that is a rank of a larger job, one that notices if other ranks make the same save.

    Raises SaveNotCommittedError if another one has just made it.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if job is not ALONE or not several:
        return job
    import_at_use("shardsave._ranks.lone_save")
    from shardsave._ranks.lone_save import lone_save

    return lone_save(path, step)


def leader_is_busy(group: ProcessGroup, where: str, busy: bool, rank_timeout: float, phase_timeout: float) -> bool:
    """Whether a save of rank 0 of ``group`` in the background is in flight. ``busy``: whether one of this rank is.

    The flights of ranks end at different moments, and all must do the same.
    """
    import_at_use("shardsave._ranks.begin")
    from shardsave._ranks.begin import session_of

    session = session_of(
        group,
        "save to",
        where,
        rank_timeout=seconds(rank_timeout, RANK_TIMEOUT),
        phase_timeout=seconds(phase_timeout, PHASE_TIMEOUT),
        apart="turn",
        raises=SaveNotCommittedError,
        state="; nothing was committed",
    )
    with session as met:
        met.gather("that it is wanted", b"")  # nobody is told before all are here, and nothing is wrong with their calls
        return met.publish("whether a save is in flight", b"busy" if busy else b"") == b"busy"


def check_digests(contents: Contents, job: Job, *, durable: bool) -> None:
    """Raises ValueError if something of ``contents``, which each process of ``job`` has planned for itself, is not the same everywhere."""
    if job.parts is not None:  # for one process alone, digests of 100,000 names would be made in vain
        job.check_equal(_digests(contents, durable=durable))


@gc_paused()
def _digests(contents: Contents, *, durable: bool) -> dict[str, bytes]:
    """A digest of everything that must be equal on all ranks, by the name that a message has for it."""
    stored = [shard.digest for shard in (*contents.shards, *contents.extra_shards)]
    extra = [[str(piece.dtype), piece.shape] for shard in contents.extra_shards for piece in shard.pieces]
    documents = {name: content.hex() for name, content in contents.documents.items()}
    companions = {name: content.hex() for name, content in contents.companions.items()}
    return {
        "durable": _digest(durable),
        "metadata": _digest(contents.metadata),
        "step": _digest(contents.moment.step),
        **{f"metric {name!r}": _digest(value) for name, value in contents.moment.metrics.items()},
        "max_shard_size": _digest(contents.max_shard_size),
        "files beside the weights": _digest(companions),
        "architecture or program": _digest(documents),
        "tensors in the files": _digest(
            [stored, extra, contents.flags, contents.module_flags, contents.ties, contents.single_file]
        ),
    }


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:8]
