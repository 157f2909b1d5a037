"""The commit of a save by several ranks: rank 0 announces it, renames the index, and publishes the outcome to all.

Until the announcement any rank can end the save; from then on none can. A rank that is not told the outcome reads the index.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from shardsave._common.os_calls import CallFailed
from shardsave._ranks.claims import Claims
from shardsave._ranks.failures import JobFailed, StoreLost, failure_of, unpacked
from shardsave._ranks.save_messages import decode_committed, encode_committed
from shardsave._ranks.session import Session
from shardsave._saving.job import Committed
from shardsave._storage.commit_errors import rank_lost_after_commit, rank_lost_in_commit
from shardsave.errors import DurabilityUncertainError, SaveNotCommittedError, ShardSaveError

#: What rank 0 publishes: that nothing can end the save any more, since it renames the index now; and what came of it.
_BEGINS, _OUTCOME = "begin of the commit", "outcome of the commit"

#: Begins an outcome that is an error.
_FAILED = b"!"

#: How long a rank that was not told the outcome looks for the new index, and the pause after each look, in seconds.
_PATIENCE, _PAUSE = 2.0, 0.02


class JobCommit:
    """The commit of one save over ``session`` into the directory ``where``, which messages name."""

    def __init__(self, session: Session, where: str) -> None:
        self._session = session
        self._where = where
        self._begun = False  # whether the index may have been renamed

    def begin(self) -> None:
        """Called on rank 0, right before the rename. If it returns, no other rank can end the save any more."""
        self._session.watch = None
        self._session.publish(_BEGINS, b"")
        self._begun = True

    def lead(self, work: Callable[[], Committed], claims: Claims | None) -> Committed:
        """Rank 0: commits by ``work``, which calls `begin`, and tells the others the outcome."""
        with self._session.for_all():
            committed = self._outcome(work)
        if claims is not None:  # before any rank goes on, and may save something else
            claims.leave()
        self._publish_outcome(encode_committed(committed))
        return committed

    def follow(self, is_in_index: Callable[[], bool]) -> Committed:
        """All other ranks: returns or raises the outcome. ``is_in_index``: whether the index that is there now is the one of this save."""
        try:
            self._session.publish(_BEGINS)
        except StoreLost as error:
            raise self._what_became(is_in_index, error) from error
        try:
            outcome = self._session.publish(_OUTCOME)
        except (JobFailed, StoreLost) as error:
            raise self._what_became(is_in_index, error) from error
        if outcome[:1] == _FAILED:
            raise unpacked(outcome[1:]).error(SaveNotCommittedError)
        return decode_committed(outcome)

    def _outcome(self, work: Callable[[], Committed]) -> Committed:
        try:
            return work()
        except Exception as error:
            if self._begun:
                failure = failure_of(error, "")
                with suppress(JobFailed, StoreLost):
                    self._session.publish(_OUTCOME, _FAILED + failure.packed())
            raise

    def _publish_outcome(self, outcome: bytes) -> None:
        try:
            self._session.publish(_OUTCOME, outcome)
        except (JobFailed, StoreLost) as error:
            raise rank_lost_after_commit(self._where, error) from error

    def _what_became(self, is_in_index: Callable[[], bool], error: ShardSaveError) -> DurabilityUncertainError:
        """The error for a rank that was not told whether the commit took effect: what the index proves."""
        end = time.monotonic() + _PATIENCE
        while True:
            with suppress(CallFailed):
                if is_in_index():
                    return rank_lost_after_commit(self._where, error)
            if time.monotonic() > end:
                return rank_lost_in_commit(self._where, error)
            time.sleep(_PAUSE)
