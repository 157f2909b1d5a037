"""Whether other ranks of the job have just saved into the same directory, apart from those that save now.

Who commits a save leaves a claim in the store of the job: the ranks that made it, the step, the time, and the identity of the index file.
Who saves there later looks, once it has the lock, whether the index is still that of a claim of other ranks. So machines that have
different disks under one path do not disturb each other. Nothing here is collective: of ranks that save together, the first asks for all.
No call waits longer than a second: a store that does not answer is asked no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from shardsave._format.file_names import INDEX_NAME
from shardsave._ranks import group as groups
from shardsave._ranks.store_connection import StoreConnection
from shardsave._ranks.topology import listed, runs_of
from shardsave.errors import SaveNotCommittedError

_T = TypeVar("_T")

#: For so many seconds at most a save waits for the store.
_PATIENCE = 1.0
#: A save that begins within so many seconds after that of other ranks is the same one, unless both have steps and these differ.
_SAME_SAVE = 10.0
#: So many claims of a process are kept in the store.
_MOST_CLAIMS = 64

_PREFIX = "shardsave/claims"

#: The stores that have not answered in time.
_silent: weakref.WeakSet[groups.Store] = weakref.WeakSet()
#: The keys of the claims of this process, the oldest first.
_own_keys: deque[str] = deque()


class Claim(NamedTuple):
    """Who has committed a checkpoint. ``runs``: the first and the last rank of each run of ranks. ``at``: when, in seconds since 1970.
    ``file``: the identity of the index file.
    """

    runs: list[list[int]]
    step: int | None
    at: float
    file: list[int]

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(rank for first, last in self.runs for rank in range(first, last + 1))


class Claims:
    """What one save asks, and leaves: first `begin`, then `check` with the lock, then `leave` after the commit.

    Threads: any, one at a time.
    """

    def __init__(self, directory: str, ranks: Sequence[int], store: groups.Store) -> None:
        """``ranks``: those that save together, by their numbers in the job."""
        self._directory = directory
        self._ranks = frozenset(ranks)
        self._key = _key_of(directory)
        self._store = store
        self._step: int | None = None
        self._known: Claim | None = None

    def begin(self, step: Any) -> None:
        """Called before anything is planned. ``step``: the argument of the save. Raises SaveNotCommittedError if other ranks have just made
        the same save."""
        self._known = self._claim_of_others()
        if self._known is not None and self._is_same_save(self._known, step):
            raise self._refusal(self._known)

    def check(self, step: int | None) -> list[str]:
        """Called with the lock, before anything is written. Returns a note if what will be replaced was saved by other ranks.

        A claim that was not there at `begin` is that of a save at the same time. Raises SaveNotCommittedError as `begin` does.
        """
        self._step = step
        claim = self._claim_of_others()
        if claim is None:
            return []
        if self._is_same_save(claim, step) or (claim != self._known and self._is_apart(claim)):
            raise self._refusal(claim)
        these = f"{_are(self._ranks, 'this is', 'these are')} {_words(self._ranks)}"
        return [
            f"{_words(claim.ranks)} of this job had saved the checkpoint that is replaced, {these}: ranks that are to save one checkpoint "
            f"together need one process_group="
        ]

    def leave(self) -> None:
        """Leaves a claim of these ranks to the checkpoint that is in the directory now."""
        index = self._index()
        if index is not None:
            claim = Claim(runs_of(self._ranks), self._step, time.time(), index)
            self._ask(lambda line: self._set(line, json.dumps(claim).encode()))

    def _set(self, line: StoreConnection, claim: bytes) -> None:
        line.set(self._key, claim)
        if self._key in _own_keys:
            _own_keys.remove(self._key)
        _own_keys.append(self._key)
        if len(_own_keys) > _MOST_CLAIMS:
            line.delete([_own_keys.popleft()])

    def _claim_of_others(self) -> Claim | None:
        """The claim to the checkpoint that is in the directory now, unless all ranks that made it save now too."""
        index = self._index()
        data = self._ask(lambda line: line.peek(self._key)) if index is not None else None
        if data is None:
            return None
        claim = Claim(*json.loads(data))
        return claim if claim.file == index and not claim.ranks <= self._ranks else None

    def _index(self) -> list[int] | None:
        try:
            found = os.stat(os.path.join(self._directory, INDEX_NAME))
        except OSError:
            return None
        return [found.st_ino, found.st_mtime_ns, found.st_size]

    def _is_apart(self, claim: Claim) -> bool:
        """Whether no rank has made both saves: one that has knows what it replaces."""
        return not claim.ranks & self._ranks

    def _is_same_save(self, claim: Claim, step: Any) -> bool:
        if not self._is_apart(claim):
            return False
        if claim.step is not None and step is not None:
            return bool(claim.step == step)
        return abs(time.time() - claim.at) < _SAME_SAVE

    def _refusal(self, claim: Claim) -> SaveNotCommittedError:
        theirs, ours = _words(claim.ranks), _words(self._ranks)
        found = f"{theirs} {_are(claim.ranks, 'has', 'have')} just saved there and {ours} {_are(self._ranks, 'was', 'were')}"
        advice = "each by itself; pass process_group=torch.distributed.group.WORLD on all ranks, or save on one rank alone"
        if len(claim.ranks | self._ranks) > 2:
            advice = "each by themselves; pass one process_group= that has all of them, or give each a directory of its own"
        return SaveNotCommittedError(
            f"cannot save to {self._directory}: one save for all ranks of the job was expected, {found} about to replace that, {advice}; "
            f"nothing was written, the checkpoint of {theirs} is intact"
        )

    def _ask(self, call: Callable[[StoreConnection], _T]) -> _T | None:
        """What ``call`` returns; None if the store does not answer in time."""
        if self._store in _silent:
            return None
        line = StoreConnection(self._store, _PREFIX)
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


def claims_of(directory: str, ranks: Sequence[int]) -> Claims | None:
    """The claims to ``directory`` as ``ranks`` see them; None if there is no store to ask."""
    try:
        return Claims(directory, ranks, groups.job_store())
    except (RuntimeError, ValueError):  # another version of torch, or a job that has just ended
        return None


def saved_apart(line: StoreConnection, directory: str, ranks: Iterable[int], seconds: float) -> str:
    """What to say if some of ``ranks``, which others wait for, have saved into ``directory`` by themselves in the last ``seconds``."""
    data = line.beside(_PREFIX).peek(_key_of(directory))
    claim = Claim(*json.loads(data)) if data is not None else None
    if claim is None or not claim.ranks <= {*ranks} or abs(time.time() - claim.at) > seconds + _SAME_SAVE:
        return ""
    return f"; {_words(claim.ranks)} {_are(claim.ranks, 'has', 'have')} saved there without the others, and needed the same process_group="


def _words(ranks: frozenset[int]) -> str:
    return listed(sorted(ranks))


def _are(ranks: frozenset[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def _key_of(directory: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:32]
