"""Which processes save together, and what must be equal on all of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from shardsave._api.process_group import collective_group
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT, seconds
from shardsave._common.gc_pause import gc_paused
from shardsave._common.imports import import_at_use
from shardsave._common.processes import several_processes
from shardsave._saving.contents import Contents
from shardsave._saving.job import ALONE, LAYOUT, Job
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._state.module import Source

#: Metadata of more keys, or with a key of more characters, are compared as a whole.
_MOST_KEYS = 64


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
    from shardsave._ranks.open_session import session_of
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
    """``job``, which notices if other ranks of a larger job have just made the same save by themselves: then it raises
    SaveNotCommittedError, here or before anything is written.
    """
    if not several_processes():
        return job
    if job is ALONE:
        import_at_use("shardsave._ranks.lone_save")
        from shardsave._ranks.lone_save import lone_save

        return lone_save(path, step)
    job.claim(path, step)
    return job


def leader_is_busy(
    group: ProcessGroup, where: str, if_busy: str, busy: bool, rank_timeout: float, phase_timeout: float
) -> bool:
    """Whether a save of rank 0 of ``group`` in the background is in flight. ``busy``: whether one of this rank is.

    The flights of ranks end at different moments, and all must do the same. Raises ValueError if ``if_busy`` is not the same on all.
    """
    import_at_use("shardsave._ranks.open_session")
    from shardsave._ranks.open_session import session_of

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
        everywhere = met.gather("if_busy", if_busy.encode())  # nobody is told before all are here
        for rank, theirs in enumerate(everywhere or ()):
            if theirs != if_busy.encode():
                with met.for_all():
                    raise ValueError(
                        f"cannot save to {where}: the same if_busy was expected on all ranks, it is {if_busy!r} on {met.name(0)}, "
                        f"{theirs.decode()!r} on {met.name(rank)}; nothing was written"
                    )
        return met.publish("whether a save is in flight", b"busy" if busy else b"") == b"busy"


def check_digests(contents: Contents, job: Job, arguments: Mapping[str, object]) -> None:
    """Raises ValueError if something of ``contents``, which each process of ``job`` has planned for itself, is not the same everywhere,
    or one of ``arguments``."""
    if job.parts is not None:  # for one process alone, digests of 100,000 names would be made in vain
        job.check_equal({**arguments, **_facts(contents)}, lambda: _tensors(contents))


@gc_paused()
def _facts(contents: Contents) -> dict[str, object]:
    """Everything that must be equal on all ranks, by the name that a message has for it: values, or digests of what is long."""
    stored = [shard.digest for shard in (*contents.shards, *contents.extra_shards)]
    extra = [[str(piece.dtype), piece.shape] for shard in contents.extra_shards for piece in shard.pieces]
    files = {f"file {name!r} beside the weights": content.hex() for name, content in contents.companions.items()}
    parts = {name: content.hex() for name, content in contents.documents.items()}
    return {
        **_by_key(contents.metadata),
        "step": contents.moment.step,
        **{f"metric {name!r}": value for name, value in contents.moment.metrics.items()},
        "max_shard_size": contents.max_shard_size,
        **{name: _digest(content) for name, content in {**files, **parts}.items()},
        LAYOUT: _digest([stored, extra, contents.single_file]),
        "set of freeze flags and ties": _digest([contents.flags, contents.module_flags, contents.ties]),
    }


def _tensors(contents: Contents) -> dict[str, str]:
    """What each tensor is on disk, by name, for a message."""
    shards = (*contents.shards, *contents.extra_shards)
    return {tensor.name: f"{tensor.dtype} {list(tensor.shape)}" for shard in shards for tensor in shard.layout.tensors}


def _by_key(metadata: Mapping[str, Any]) -> dict[str, object]:
    """``metadata`` key by key, so that a message can name the one that differs; as a whole if there are many keys, or long ones."""
    if max(len(metadata), *map(len, metadata), 0) > _MOST_KEYS:
        return {"metadata": metadata}
    return {f"metadata[{key!r}]": value for key, value in metadata.items()}


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:8]
