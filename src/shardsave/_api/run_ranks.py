"""The ranks that share the run of a manager: which they are, and how all do what rank 0 has found."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

from shardsave._api.rank_timeouts import PHASE_TIMEOUT, RANK_TIMEOUT, seconds
from shardsave._common.imports import import_at_use
from shardsave.errors import SaveNotCommittedError, ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from shardsave._ranks.decisions import Decisions
    from shardsave._ranks.session import Session


class RunRanks:
    """The ranks of the run ``shown``: this process alone, until a call has a group or DTensors.

    ``leads``: whether this process lists, keeps and removes steps.
    """

    def __init__(self, shown: str) -> None:
        self.leads = True
        self._shown = shown
        self._group: ProcessGroup | None = None
        self._rank_timeout = RANK_TIMEOUT
        self._phase_timeout = PHASE_TIMEOUT

    @property
    def are_many(self) -> bool:
        return self._group is not None

    def look(self, source: Any, options: Mapping[str, Any], training: Any) -> None:
        """Looks whether a save or resume of ``source`` with these options is collective. Once one was, all are.

        Raises TypeError or ValueError for a wrong group.
        """
        if self._group is not None or not _in_job():
            return
        import_at_use("shardsave._api.process_group")
        from shardsave._api.process_group import collective_group

        self._rank_timeout = seconds(options.get("rank_timeout"), RANK_TIMEOUT)
        self._phase_timeout = seconds(options.get("phase_timeout"), PHASE_TIMEOUT)
        self._group = collective_group(source, options.get("process_group"), training)
        self.leads = self._group is None or sys.modules["torch.distributed"].get_rank(self._group) == 0

    @property
    def advice(self) -> str:
        """What else an error says that finds steps of another writer: it may be a rank of this job, if each saves by itself."""
        if self._group is not None or not _in_job() or sys.modules["torch.distributed"].get_world_size() == 1:
            return ""
        return ", or pass process_group=torch.distributed.group.WORLD on all ranks of this job, if they are to save it together"

    def from_leader(self, what: str, find: Callable[[], Any]) -> Any:
        """What ``find`` returns on rank 0, a JSON value, on all ranks; what it raises there is raised on all."""
        if self._group is None:
            return find()
        with self._session("resume from", self._shown, "run") as session:
            # nobody is told it before all are here, and nothing is wrong with their calls
            session.gather(f"that {what} is wanted", b"")
            with session.for_all():
                found = json.dumps(find()).encode() if session.leads else None
            return json.loads(session.publish(what, found))

    def check_equal(self, facts: Mapping[str, str]) -> None:
        """Raises ValueError on all ranks if ``facts``, by the name that a message has for them, are not the same on all."""
        if self._group is None:
            return
        with self._session("save to", self._shown, "run") as session:
            everywhere = [json.loads(one) for one in session.exchange("facts", json.dumps(facts).encode())]
            for name, (rank, theirs) in ((name, one) for one in enumerate(everywhere) for name in facts):
                if theirs[name] != (first := everywhere[0][name]):
                    with session.for_all():
                        raise ValueError(
                            f"cannot save to {self._shown}: the same {name} was expected on all ranks, it is {first} on "
                            f"{session.name(0)}, {theirs[name]} on {session.name(rank)}; nothing was written"
                        )

    def refuse(self, error: Exception, verb: str, where: str, apart: str) -> NoReturn:
        """Raises ``error`` on all ranks: the others make a call that begins with a session of this kind."""
        if self._group is not None:
            with self._session(verb, where, apart):
                raise error
        raise error

    def _session(self, verb: str, where: str, apart: str) -> AbstractContextManager[Session]:
        assert self._group is not None
        import_at_use("shardsave._ranks.open_session")
        from shardsave._ranks.arrivals import SAVE
        from shardsave._ranks.open_session import session_of

        saves = verb == SAVE
        return session_of(
            self._group,
            verb,
            where,
            rank_timeout=self._rank_timeout,
            phase_timeout=self._phase_timeout,
            apart=apart,
            raises=SaveNotCommittedError if saves else ShardSaveError,
            state="; nothing was committed" if saves else "",
        )

    def decisions(self) -> Decisions:
        """Made anew; all ranks must ask for them."""
        assert self._group is not None
        import_at_use("shardsave._ranks.decisions")
        from shardsave._ranks.decisions import decisions_of

        return decisions_of(self._group, self._shown, self._phase_timeout)


def _in_job() -> bool:
    """Whether this process is a rank of a job. torch.distributed is not imported for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
