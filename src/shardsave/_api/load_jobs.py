"""Which processes load together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from shardsave._api.process_group import collective_group, members
from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT, check_timeouts, seconds
from shardsave._common.imports import import_at_use
from shardsave._loading.job import ALONE, LoadJob
from shardsave._state.fsdp import reshard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@contextmanager
def job_of_load(
    model: Any,
    path: str | os.PathLike[str],
    verb: str,
    process_group: ProcessGroup | None,
    rank_timeout: float,
    phase_timeout: float,
    training: Any = None,
) -> Iterator[LoadJob]:
    """Meets the other ranks if the load is collective. What one of them raises within the context is raised on all.

    ``training``: a training state that is filled too. Raises TypeError, ValueError for a wrong ``process_group``, ``rank_timeout`` or
    ``phase_timeout``, and ShardSaveError if a rank does not come.
    """
    module = model if isinstance(model, nn.Module) else None
    if module is not None:
        reshard(module)  # parameters that a forward pass left whole are DTensors again
    group = collective_group(module, process_group, training)
    if group is None:
        check_timeouts(rank_timeout, phase_timeout)
        yield ALONE
        return
    import_at_use("shardsave._ranks.load_job")  # most loads are by one process
    from shardsave._ranks.load_job import LoadJob as JobOfRanks
    from shardsave._ranks.open_session import session_of

    where = str(os.fspath(path) if isinstance(path, (str, os.PathLike)) else repr(path))
    session = session_of(
        group,
        verb,
        where,
        rank_timeout=seconds(rank_timeout, RANK_TIMEOUT),
        phase_timeout=seconds(phase_timeout, PHASE_TIMEOUT),
    )
    with session as met:
        check_timeouts(rank_timeout, phase_timeout)
        yield JobOfRanks(met, members(group), where, verb)
