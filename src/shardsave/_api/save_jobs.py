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
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._saving.contents import Contents
from shardsave._saving.job import ALONE, Job
from shardsave._state.module import Entry, State
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._state.module import Source

#: For a meeting, if the argument cannot be one: all ranks are to learn that it is wrong.
_RANK_TIMEOUT = 120.0


@contextmanager
def job_of_save(
    source: Source,
    directory: str | os.PathLike[str],
    process_group: ProcessGroup | None,
    training: Any = None,
    *,
    durable: bool,
    rank_timeout: float,
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
    from shardsave._ranks.failures import StoreLost
    from shardsave._ranks.save_job import JobFailed, SaveJob
    from shardsave._ranks.session import begin

    seconds = _seconds(rank_timeout)
    where = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else repr(directory)
    try:
        with begin(group, verb, where, rank_timeout=seconds, usual=JobFailed, apart=apart) as session:
            yield SaveJob(session, session.names, where, durable=durable, on_divergence=on_divergence)
    except (JobFailed, StoreLost) as error:
        words = f"{error}"
        failed = words if words.startswith("cannot ") else f"cannot {verb} {where}: {words}"
        raise SaveNotCommittedError(f"{failed}; nothing was committed") from error


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


def leader_is_busy(group: ProcessGroup, where: str, busy: bool, rank_timeout: float) -> bool:
    """Whether a save of rank 0 of ``group`` in the background is in flight. ``busy``: whether one of this rank is.

    The flights of ranks end at different moments, and all must do the same.
    """
    import_at_use("shardsave._ranks.session")
    from shardsave._ranks.session import begin

    with begin(group, "save to", where, rank_timeout=_seconds(rank_timeout), apart="turn") as session:
        return session.publish("whether a save is in flight", b"busy" if busy else b"") == b"busy"


def _seconds(rank_timeout: float) -> float:
    return rank_timeout if isinstance(rank_timeout, (int, float)) and rank_timeout > 0 else _RANK_TIMEOUT


def agreed(contents: Contents, job: Job, *, durable: bool) -> Contents:
    """``contents``, which each process of ``job`` has planned for itself, once they are known to be the same.

    Raises ValueError for arguments that differ, UnsupportedTensorError for extra tensors that do.
    """
    if job.parts is None:  # for one process alone, digests of 100,000 names would be made in vain
        return contents
    job.check_equal(_digests(contents, durable=durable))
    if not contents.extra_shards:
        return contents
    own = [
        Entry(name, "buffer", None, None, piece)
        for shard in contents.extra_shards
        for name, piece in zip(shard.names, shard.pieces)
    ]
    state = job.agree(State(tuple(own), flags_known=False, overlaps=()), "extra tensors")
    of_all = contents.with_sources({id(entry.source): of_job.source for entry, of_job in zip(own, state.entries)})
    return of_all._replace(notes=(*contents.notes, *state.notes))


@gc_paused()
def _digests(contents: Contents, *, durable: bool) -> dict[str, bytes]:
    """A digest of everything that must be equal on all ranks, by the name that a message has for it."""
    stored = [[shard.names, shard.layout.data_bytes] for shard in (*contents.shards, *contents.extra_shards)]
    documents = {name: content.hex() for name, content in contents.documents.items()}
    companions = {name: content.hex() for name, content in contents.companions.items()}
    return {
        "durable": _digest(durable),
        "metadata": _digest(contents.metadata),
        "step": _digest(contents.moment.step),
        "metrics": _digest([*contents.moment.metrics.items()]),
        "max_shard_size": _digest(contents.max_shard_size),
        "files beside the weights": _digest(companions),
        "architecture or program": _digest(documents),
        "tensors in the files": _digest([stored, contents.flags, contents.module_flags, contents.ties, contents.single_file]),
    }


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:8]
