"""Which processes load together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from shardsave._api.arguments import check_timeout
from shardsave._api.process_group import collective_group, members
from shardsave._common.imports import import_at_use
from shardsave._loading.job import ALONE, LoadJob
from shardsave._state.fsdp import reshard
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: For a meeting, if the argument cannot be one: all ranks are to learn that it is wrong.
_RANK_TIMEOUT = 120.0


@contextmanager
def job_of_load(
    model: Any,
    path: str | os.PathLike[str],
    verb: str,
    process_group: ProcessGroup | None,
    rank_timeout: float,
    training: Any = None,
) -> Iterator[LoadJob]:
    """Meets the other ranks if the load is collective. What one of them raises within the context is raised on all.

    ``training``: a training state that is filled too. Raises TypeError, ValueError for a wrong ``process_group`` or ``rank_timeout``, and
    ShardSaveError if a rank does not come.
    """
    module = model if isinstance(model, nn.Module) else None
    if module is not None:
        reshard(module)  # parameters that a forward pass left whole are DTensors again
    group = collective_group(module, process_group, training)
    if group is None:
        check_timeout(rank_timeout, "rank_timeout")
        yield ALONE
        return
    import_at_use("shardsave._ranks.load_job")  # most loads are by one process
    from shardsave._ranks.failures import StoreLost
    from shardsave._ranks.load_job import LoadJob as JobOfRanks
    from shardsave._ranks.session import begin

    usable = isinstance(rank_timeout, (int, float)) and rank_timeout > 0
    where = os.fspath(path) if isinstance(path, (str, os.PathLike)) else repr(path)
    try:
        with begin(group, verb, str(where), rank_timeout=rank_timeout if usable else _RANK_TIMEOUT) as session:
            check_timeout(rank_timeout, "rank_timeout")
            yield JobOfRanks(session, members(group), str(where))
    except StoreLost as error:
        raise ShardSaveError(str(error)) from error
