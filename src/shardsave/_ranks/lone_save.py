"""A save by one rank of a job, without a group: it notices if other ranks have just saved into the same directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from shardsave._ranks.claims import Claims, claims_of
from shardsave._saving.job import ALONE, Alone, Committed, Job, Prepared

if TYPE_CHECKING:
    from shardsave._saving.comparison import Comparison
    from shardsave._saving.contents import Contents
    from shardsave._saving.frozen import FrozenMemory
    from shardsave._saving.watch import Watch


def lone_save(directory: str, step: Any) -> Job:
    """The job of a save into ``directory`` by this rank alone. Raises SaveNotCommittedError if other ranks have just made the same save."""
    claims = claims_of(directory, [dist.get_rank()])
    return LoneSave(claims, step) if claims is not None else ALONE


class LoneSave(Alone):
    """The job of one process that is a rank of a larger one.

    Threads: it is made on the thread that calls, and used by the one that saves.
    """

    def __init__(self, claims: Claims, step: Any) -> None:
        """``step``: the argument of the save. Raises SaveNotCommittedError if other ranks have just made the same save."""
        self._claims = claims
        claims.begin(step)

    def prepare(
        self, contents: Contents, work: Callable[[Comparison], Prepared], frozen: Mapping[str, FrozenMemory], watch: Watch
    ) -> Prepared:
        notes = self._claims.check(contents.moment.step)
        prepared = super().prepare(contents, work, frozen, watch)
        return prepared._replace(notes=[*prepared.notes, *notes])

    def commit(self, work: Callable[[], Committed]) -> Committed:
        committed = work()
        self._claims.leave()
        return committed
