"""What rank 0 decides for all ranks of a run, one turn ahead: whether they save, and which signals ask for it.

A turn is one call that all ranks make. After each, rank 0 puts into the store of the job that it has passed it, and in which turn all
save next. The others read that when they make the next call, so none of them decides anything by itself, and no call waits for the ranks
to meet. One key is enough: rank 0 cannot pass a turn with a save before all ranks have come to it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from shardsave._common.shutdown import raise_if_ending
from shardsave._ranks.failures import StoreLost
from shardsave._ranks.group import Members, Store, job_store, members_of
from shardsave._ranks.polling import pauses_for
from shardsave._ranks.store_connection import StoreConnection
from shardsave.errors import SaveNotCommittedError, ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DECIDED, _ASKED, _LEFT = "decided", "asked", "left"


class Decision(NamedTuple):
    """``passed``: the last turn that rank 0 has passed. ``save``: the turn in which all save next, or have saved last. ``names``: of the
    signals that ask for that save."""

    passed: int = 0
    save: int = 0
    names: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return json.dumps(self).encode()

    @staticmethod
    def decode(data: bytes | None) -> Decision:
        if data is None:
            return Decision()
        passed, save, names = json.loads(data)
        return Decision(passed, save, tuple(names))


class Decisions:
    """The decisions for the run ``shown``, as one of its ranks sees them. For one thread. If the store is lost, all but `leave` raise
    ShardSaveError, since the call may have saved already.

    ``number``: of the objects for this run that all ranks have made. ``patience``: how many seconds the others wait until rank 0 has
    passed a turn: nothing says meanwhile whether it is alive.
    """

    def __init__(self, store: Store, members: Members, shown: str, number: int, patience: float) -> None:
        self.leads = members.rank == 0
        self._size = len(members.names)
        self._leader = f"rank {members.names[0]}"
        self._shown = shown
        self._patience = patience
        self._told: set[str] = set()
        run = hashlib.sha256(shown.encode()).hexdigest()[:16]
        self._line = StoreConnection(store, f"shardsave/{members.key}/run/{run}/{number}")
        self._last = Decision()
        with self._reaching():
            self._line.open()

    def of(self, passed: int) -> Decision:
        """What rank 0 has decided when it had passed the turn ``passed``; waits until it has."""
        if self.leads or passed <= self._last.passed:
            return self._last
        pauses, end = pauses_for(self._size), time.monotonic() + self._patience
        with self._reaching():
            while (found := Decision.decode(self._line.peek(_DECIDED))).passed < passed:
                raise_if_ending()
                if time.monotonic() > end:
                    raise SaveNotCommittedError(
                        f"cannot tell whether to save to {self._shown}: {self._leader} was expected within "
                        f"phase_timeout={self._patience:g} s to have finished {passed} calls of step or save as this rank has, it has "
                        f"finished {found.passed}; all ranks must make the same calls, save_on_signal too; nothing was written"
                    )
                time.sleep(pauses.rest())
                pauses.due()
        self._last = found
        return found

    def announce(self, decision: Decision) -> None:
        """Tells the other ranks. Called on rank 0 alone."""
        self._last = decision
        with self._reaching():
            self._line.set(_DECIDED, decision.encode())

    def tell(self, names: Iterable[str]) -> None:
        """Tells rank 0 which signals have come here."""
        if new := set(names) - self._told:
            self._told |= new
            with self._reaching():
                self._line.set(_ASKED, json.dumps(sorted(self._told)).encode())

    def told(self) -> list[str]:
        """The signals that another rank has told of."""
        with self._reaching():
            data = self._line.peek(_ASKED)
        return json.loads(data) if data is not None else []

    def leave(self) -> None:
        """This rank reads no more decisions. The last one that leaves removes the keys."""
        with suppress(StoreLost):
            if self._line.add(_LEFT, 1) == self._size:
                self._line.delete([_DECIDED, _ASKED, _LEFT])
        self._line.close()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except StoreLost as error:
            raise ShardSaveError(
                f"cannot tell which steps all ranks save to {self._shown}: the store of torch.distributed was expected to answer: {error}; "
                f"steps that were committed stay"
            ) from error


#: How many `Decisions` this process has made, by group and run.
_made: dict[tuple[str, str], int] = {}


def decisions_of(group: ProcessGroup, shown: str, patience: float) -> Decisions:
    """Those for the run ``shown``, which all ranks of ``group`` ask for equally often. ``patience``: as in `Decisions`."""
    members = members_of(group)
    key = members.key, shown
    _made[key] = _made.get(key, 0) + 1
    return Decisions(job_store(), members, shown, _made[key], patience)
