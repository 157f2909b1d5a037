"""Whether a manager saves at a step: what its policy and its signals say, or what rank 0 has decided for all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardsave._api.run_ranks import RunRanks
from shardsave._runs.policies import SaveWhen
from shardsave._runs.signals import SaveRequests

if TYPE_CHECKING:
    from shardsave._ranks.decisions import Decisions


class Turns:
    """Asks ``when`` and ``requests``. Among several ``ranks``, rank 0 does, after each turn for the next one, if time or signals decide.

    A turn is a call of `step` or `save`: from `begin` to `end`. ``preempted``: whether the save that signals ask for was made.
    """

    def __init__(self, when: SaveWhen, requests: SaveRequests, ranks: RunRanks) -> None:
        self.preempted = False
        self._when = when
        self._requests = requests
        self._ranks = ranks
        self._turn = 0
        self._compared = False  # that all ranks decide in the same way
        self._ordered = False  # rank 0 has decided that all save in this turn
        self._names: tuple[str, ...] = ()
        self._decisions: Decisions | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the signals that ask for a last save in this turn; none after it."""
        return () if self.preempted else self._names

    @property
    def unsaved(self) -> tuple[str, ...]:
        """The signals that this process has noted, if no save came after them."""
        return () if self.preempted else tuple(number.name for number in self._requests.noted)

    def begin(self) -> None:
        """The next call has begun. Raises SaveNotCommittedError if rank 0 or another rank does not come to it, ShardSaveError if the store
        is lost, and ValueError in the first call if not all ranks are to decide in the same way."""
        self._compare()
        self._turn += 1
        decisions = self._open_decisions()
        if decisions is None:
            self._ordered, self._names = False, tuple(number.name for number in self._requests.noted)
            return
        if not decisions.leads:
            decisions.tell(self.unsaved)
        decided = decisions.of(self._turn - 1)
        now = decided.save == self._turn
        self._ordered, self._names = now, decided.names if now else ()

    def order(self) -> None:
        """Between `begin` and `end`: all ranks save in this call, whatever was decided. They learn of signals until now."""
        decisions = self._decisions
        if decisions is not None:
            if decisions.leads:
                self._announce(decisions, save=True)
            self.begin()

    def due(self, step: int) -> bool:
        """Whether the policy says that ``step`` is to be saved. Asked once for each."""
        if self._decisions is not None and self._when.by_time:
            return self._ordered
        return self._when.due(step)

    def end(self) -> None:
        """The call is over, however it ended."""
        if self._decisions is not None and self._decisions.leads:
            self._announce(self._decisions, save=self._when.by_time and self._when.due(self._turn))

    def close(self) -> None:
        decisions, self._decisions = self._decisions, None
        if decisions is not None:
            decisions.leave()

    def _announce(self, decisions: Decisions, *, save: bool) -> None:
        from shardsave._ranks.decisions import Decision

        names = () if self.preempted else tuple(dict.fromkeys((*self.unsaved, *decisions.told())))
        decisions.announce(Decision(self._turn, self._turn + 1 if save or names else 0, names))

    def _compare(self) -> None:
        if self._ranks.are_many and not self._compared:
            facts = {"save_every": self._when.kind, "save_on_signal": "called" if self._requests.listens else "not called"}
            self._ranks.check_equal(facts)
            self._compared = True

    def _open_decisions(self) -> Decisions | None:
        if self._decisions is None and self._ranks.are_many and (self._when.by_time or self._requests.listens):
            self._decisions = self._ranks.decisions()
        return self._decisions
