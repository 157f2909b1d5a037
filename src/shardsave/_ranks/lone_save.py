"""A save by one rank of a job, without a group: whether another rank has just saved into the same directory, each what it alone has.

Whoever commits such a save leaves a claim in the store of the job: the rank, the step, the time, and the identity of the index file.
Who saves there later looks, once it has the lock, whether the index is still that of another rank's claim. So machines that have
different disks under one path do not disturb each other. Nothing here is collective, and no call waits longer than a second: a store
that does not answer is asked no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch.distributed as dist

from shardsave._format.file_names import INDEX_NAME
from shardsave._ranks import group as groups
from shardsave._ranks.line import Line
from shardsave._saving.job import ALONE, Alone, Committed, Job, Prepared
from shardsave.errors import SaveNotCommittedError

if TYPE_CHECKING:
    from shardsave._saving.comparison import Comparison
    from shardsave._saving.contents import Contents
    from shardsave._saving.frozen import FrozenMemory
    from shardsave._saving.watch import Watch

_T = TypeVar("_T")

#: For so many seconds at most a save waits for the store.
_PATIENCE = 1.0
#: A save that begins within so many seconds after that of another rank is the same one, unless both have steps and these differ.
_SAME_SAVE = 10.0
#: So many claims of a process are kept in the store.
_MOST_CLAIMS = 64

#: The stores that have not answered in time.
_silent: weakref.WeakSet[groups.Store] = weakref.WeakSet()
#: The keys of the claims of this process, the oldest first.
_own_keys: deque[str] = deque()


def lone_save(directory: str, step: Any) -> Job:
    """The job of a save into ``directory`` by this rank alone. Raises SaveNotCommittedError if another rank has just made the same save."""
    try:
        store = groups.job_store()
    except (RuntimeError, ValueError):  # another version of torch, or a job that has just ended
        return ALONE
    return LoneSave(directory, step, store)


class Claim(NamedTuple):
    """Who has committed a checkpoint. ``at``: when, in seconds since 1970. ``file``: the identity of the index file."""

    rank: int
    step: int | None
    at: float
    file: list[int]


class LoneSave(Alone):
    """The job of one process that is a rank of a larger one.

    Threads: it is made on the thread that calls, and used by the one that saves.
    """

    def __init__(self, directory: str, step: Any, store: groups.Store) -> None:
        """``step``: the argument of the save. Raises SaveNotCommittedError if another rank has just made the same save."""
        self._directory = directory
        self._step: int | None = None
        self._rank = dist.get_rank()
        self._key = _key_of(directory)
        self._store = store
        self._known = self._claim_of_another()
        if self._known is not None and self._is_same_save(self._known, step):
            raise self._refusal(self._known)

    def prepare(
        self, contents: Contents, work: Callable[[Comparison], Prepared], frozen: Mapping[str, FrozenMemory], watch: Watch
    ) -> Prepared:
        """Called with the lock, before anything is written. A claim that was not there before is that of a save at the same time."""
        self._step = contents.moment.step
        claim = self._claim_of_another()
        if claim is None:
            return super().prepare(contents, work, frozen, watch)
        if claim != self._known or self._is_same_save(claim, self._step):
            raise self._refusal(claim)
        note = (
            f"rank {claim.rank} of this job had saved the checkpoint that is replaced, this is rank {self._rank}: ranks that are to save "
            f"one checkpoint together need process_group="
        )
        prepared = super().prepare(contents, work, frozen, watch)
        return prepared._replace(notes=[*prepared.notes, note])

    def commit(self, work: Callable[[], Committed]) -> Committed:
        committed = work()
        index = self._index()
        if index is not None:
            claim = Claim(self._rank, self._step, time.time(), index)
            self._ask(lambda line: self._set(line, json.dumps(claim).encode()))
        return committed

    def _set(self, line: Line, claim: bytes) -> None:
        line.set(self._key, claim)
        if self._key in _own_keys:
            _own_keys.remove(self._key)
        _own_keys.append(self._key)
        if len(_own_keys) > _MOST_CLAIMS:
            line.delete([_own_keys.popleft()])

    def _claim_of_another(self) -> Claim | None:
        """The claim to the checkpoint that is in the directory now, if another rank has made it."""
        data = self._ask(lambda line: line.peek(self._key))
        if data is None:
            return None
        claim = Claim(*json.loads(data))
        return claim if claim.rank != self._rank and claim.file == self._index() else None

    def _index(self) -> list[int] | None:
        try:
            found = os.stat(os.path.join(self._directory, INDEX_NAME))
        except OSError:
            return None
        return [found.st_ino, found.st_mtime_ns, found.st_size]

    def _is_same_save(self, claim: Claim, step: Any) -> bool:
        if claim.step is not None and step is not None:
            return bool(claim.step == step)
        return abs(time.time() - claim.at) < _SAME_SAVE

    def _refusal(self, claim: Claim) -> SaveNotCommittedError:
        return SaveNotCommittedError(
            f"cannot save to {self._directory}: one save for all ranks of the job was expected, rank {claim.rank} has just saved there "
            f"and rank {self._rank} was about to replace that, each by itself; pass process_group=torch.distributed.group.WORLD on all "
            f"ranks, or save on one rank alone; nothing was written, the checkpoint of rank {claim.rank} is intact"
        )

    def _ask(self, call: Callable[[Line], _T]) -> _T | None:
        """What ``call`` returns; None if the store does not answer in time."""
        if self._store in _silent:
            return None
        line = Line(self._store, "shardsave/lone")
        answers: SimpleQueue[_T | None] = SimpleQueue()

        def ask() -> None:
            answer = None
            with suppress(Exception):  # whatever is wrong with the store, the save does not need it
                line.open()
                answer = call(line)
            answers.put(answer)

        try:
            threading.Thread(target=ask, name="shardsave: store", daemon=True).start()
            return answers.get(timeout=_PATIENCE)
        except (RuntimeError, Empty):  # no thread can be started, or the store is not there
            _silent.add(self._store)
            line.give_up()
            return None


def _key_of(directory: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:32]
