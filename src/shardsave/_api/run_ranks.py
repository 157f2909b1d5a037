"""The ranks that share the run of a manager: which they are, and how all do what rank 0 has found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from shardsave._common.imports import import_at_use
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._ranks.decisions import Decisions

#: For a meeting, if the argument cannot be one: the save or resume itself says so.
_RANK_TIMEOUT = 120.0


class RunRanks:
    """The ranks of the run ``shown``: this process alone, until a call has a group or DTensors.

    ``leads``: whether this process lists, keeps and removes steps.
    """

    def __init__(self, shown: str) -> None:
        self.leads = True
        self._shown = shown
        self._group: ProcessGroup | None = None
        self._seconds = _RANK_TIMEOUT

    @property
    def are_many(self) -> bool:
        return self._group is not None

    def look(self, source: Any, options: Mapping[str, Any], training: Any) -> None:
        """Looks whether a save or resume of ``source`` with these options is collective. Once one was, all are.

        Raises TypeError or ValueError for a wrong group.
        """
        distributed = sys.modules.get("torch.distributed")
        if self._group is not None or distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return
        import_at_use("shardsave._api.process_group")
        from shardsave._api.process_group import collective_group

        seconds = options.get("rank_timeout")
        if isinstance(seconds, (int, float)) and seconds > 0:
            self._seconds = float(seconds)
        self._group = collective_group(source, options.get("process_group"), training)
        self.leads = self._group is None or distributed.get_rank(self._group) == 0

    def from_leader(self, what: str, find: Callable[[], Any]) -> Any:
        """What ``find`` returns on rank 0, a JSON value, on all ranks; what it raises there is raised on all."""
        if self._group is None:
            return find()
        import_at_use("shardsave._ranks.session")
        from shardsave._ranks.failures import StoreLost
        from shardsave._ranks.session import begin

        try:
            with begin(self._group, "resume from", self._shown, rank_timeout=self._seconds, apart="run") as session:
                return json.loads(session.publish(what, json.dumps(find()).encode() if session.leads else None))
        except StoreLost as error:
            raise ShardSaveError(str(error)) from error

    def decisions(self) -> Decisions:
        """Made anew; all ranks must ask for them."""
        assert self._group is not None
        import_at_use("shardsave._ranks.decisions")
        from shardsave._ranks.decisions import decisions_of

        return decisions_of(self._group, self._shown)
