"""One collective call: the ranks of a group meet, tell each other values, and end with the same error if one of them fails.

Only the store of torch.distributed is used: no collective, nothing that blocks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from shardsave import errors
from shardsave._ranks import group as groups
from shardsave.errors import ShardSaveError

if TYPE_CHECKING:
    from torch.distributed import PrefixStore, ProcessGroup

_PART = 1 << 20
_SEALED = "sealed"


class StoreLost(ShardSaveError):
    """The store of the job does not answer: the process that serves it is gone, or cannot be reached."""


class Session:
    """What the ranks of one call have in common. Rank ``r`` has the global number ``names[r]``."""

    def __init__(
        self, store: PrefixStore, members: groups.Members, hosts: tuple[int, ...], rank_timeout: float, phase_timeout: float
    ) -> None:
        self.rank, self.size, self.hosts = members.rank, len(members.names), hosts
        self.leads = self.rank == 0
        self.rank_timeout, self.phase_timeout = rank_timeout, phase_timeout
        self._names = members.names
        self._store = store
        self._keys: list[str] = []
        self._number = 0
        self._error: BaseException | None = None
        self._sealed = False

    def name(self, rank: int) -> str:
        return f"rank {self._names[rank]}"

    def exchange(self, what: str, mine: bytes) -> list[bytes]:
        """From each rank one value, on all ranks, in order of ranks."""
        number = self._next(what)
        self._set(f"{number}/{self.rank}", mine)
        return [self._get(f"{number}/{rank}", what) for rank in range(self.size)]

    def gather(self, what: str, mine: bytes) -> list[bytes] | None:
        """From each rank one value, on rank 0 alone."""
        number = self._next(what)
        self._set(f"{number}/{self.rank}", mine)
        return [self._get(f"{number}/{rank}", what) for rank in range(self.size)] if self.leads else None

    def publish(self, what: str, value: bytes | None = None) -> bytes:
        """A value of rank 0, on all ranks."""
        number = self._next(what)
        if self.leads:
            assert value is not None
            self._set(f"{number}/0", value)
            return value
        return self._get(f"{number}/0", what)

    def check(self) -> None:
        """Raises the error of the job if a rank has failed or was lost. Any thread may call it."""
        if self._error is None and not self._sealed and self._store.check(["error"]):
            record = json.loads(self._store.get("error"))
            self._sealed = record == _SEALED
            self._error = None if self._sealed else _revived(record)
        if self._error is not None:
            raise self._error

    def seal(self) -> None:
        """Makes sure that no rank has failed, and that what fails from now on is no error of the job any more. Raises that error."""
        won = json.loads(self._store.compare_set("error", "", json.dumps(_SEALED)))
        self._sealed = won == _SEALED
        if not self._sealed:
            self._error = _revived(won)
            raise self._error

    def fail(self, error: BaseException) -> BaseException:
        """Tells all ranks of ``error``. Returns what is to be raised: the first error of the job."""
        if error is self._error or self._sealed:
            return error
        record = _record(self.name(self.rank), error)
        won = self._store.compare_set("error", "", json.dumps(record))
        if not isinstance(error, Exception) or json.loads(won) == _SEALED:
            return error
        self._error = _revived(json.loads(won))
        self._error.__cause__ = error
        return self._error

    def close(self) -> None:
        if self._store.add("left", 1) == self.size:
            for rank in range(self.size):
                for key in json.loads(self._store.get(f"keys/{rank}")) if self._store.check([f"keys/{rank}"]) else ():
                    self._store.delete_key(key)
            self._store.delete_key("left")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        raised = None if error is None else self.fail(error)
        self.close()
        if raised is not None and raised is not error:
            raise raised from error

    def _next(self, what: str) -> int:
        self.check()
        self._number += 1
        return self._number

    def _set(self, key: str, value: bytes) -> None:
        parts = [value[begin : begin + _PART] for begin in range(0, len(value), _PART)]
        for number, part in enumerate(parts):
            self._store.set(f"{key}/{number}", part)
        self._store.set(key, str(len(parts)))

    def _get(self, key: str, what: str) -> bytes:
        if not _wait_until(lambda: self._store.check([key]), self.phase_timeout, self.check):
            raise ShardSaveError(f"'{what}' took longer than {self.phase_timeout:g} s")
        return b"".join(self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key))))


def begin(group: ProcessGroup, verb: str, where: str, *, rank_timeout: float = 120.0, phase_timeout: float = 1800.0) -> Session:
    """Meets the other ranks of ``group``, which call the same ``verb`` about the same ``where``."""
    import torch.distributed as dist

    members = groups.members(group)
    store = dist.PrefixStore(f"shardsave/{members.key}", groups.job_store())
    call = json.dumps([os.urandom(8).hex(), verb, where, groups.host()])
    mine = f"arrived/{members.rank}"
    if members.rank:
        store.set(mine, call)
        answer = f"answer/{json.loads(call)[0]}"
        if not _wait_until(lambda: store.check([answer]), rank_timeout):
            store.delete_key(mine)
            raise ShardSaveError(f"cannot {verb} {where}: rank {members.names[0]} did not come within {rank_timeout:g} s")
        reply = json.loads(store.get(answer))
        store.delete_key(answer)
        store.delete_key(mine)
    else:
        reply = _meet(store, members, call, rank_timeout)
    if "error" in reply:
        raise _revived(reply["error"])
    hosts = tuple(reply["hosts"])
    return Session(
        dist.PrefixStore(f"shardsave/{members.key}/{reply['session']}", groups.job_store()),
        members,
        hosts,
        rank_timeout,
        phase_timeout,
    )


_used: dict[str, set[str]] = {}
_lock = threading.Lock()


def _meet(store: PrefixStore, members: groups.Members, call: str, seconds: float) -> dict[str, object]:
    calls = {0: json.loads(call)}
    used = _used.setdefault(members.key, set())

    def all_came() -> bool:
        for rank in range(1, len(members.names)):
            if rank not in calls and store.check([f"arrived/{rank}"]):
                other = json.loads(store.compare_set(f"arrived/{rank}", "-", "-"))
                if other[0] not in used:
                    calls[rank] = other
        return len(calls) == len(members.names)

    complete = _wait_until(all_came, seconds)
    _, verb, where, _ = calls[0]
    reply: dict[str, object]
    missing = [str(members.names[rank]) for rank in range(len(members.names)) if rank not in calls]
    others = [rank for rank in sorted(calls) if calls[rank][1:3] != [verb, where]]
    if others:
        listed = "; ".join(f"rank {members.names[rank]} calls {calls[rank][1]} of {calls[rank][2]}" for rank in others)
        text = f"cannot {verb} {where}: all ranks were expected to make the same call, {listed}"
        reply = {"error": ["ValueError", text]}
    elif not complete:
        text = f"cannot {verb} {where}: all ranks of the group were expected within {seconds:g} s, did not come: {', '.join(missing)}"
        reply = {"error": ["ShardSaveError", text]}
    else:
        kinds = sorted({calls[rank][3] for rank in calls}, key=lambda kind: min(r for r in calls if calls[r][3] == kind))
        reply = {"session": os.urandom(8).hex(), "hosts": [kinds.index(calls[rank][3]) for rank in range(len(members.names))]}
    for rank, other in calls.items():
        used.add(other[0])
        if rank:
            store.set(f"answer/{other[0]}", json.dumps(reply))
    return reply


def _record(name: str, error: BaseException) -> list[str]:
    if not isinstance(error, Exception):
        return ["ShardSaveError", f"{name} was interrupted"]
    for kind in type(error).__mro__:
        if kind in (TypeError, ValueError, MemoryError) or getattr(errors, kind.__name__, None) is kind:
            return [kind.__name__, f"{name}: {error}"]
    return ["ShardSaveError", f"{name}: {type(error).__name__}: {error}"]


def _revived(record: object) -> BaseException:
    assert isinstance(record, list)
    kinds = {"TypeError": TypeError, "ValueError": ValueError, "MemoryError": MemoryError}
    kind = kinds.get(record[0]) or getattr(errors, record[0])
    error: BaseException = kind(record[1])
    return error


def _wait_until(done: Callable[[], bool], seconds: float, check: Callable[[], None] = lambda: None) -> bool:
    """Polls with growing pauses. Returns whether it was done in time."""
    end = time.monotonic() + seconds
    pause = 0.0005
    while not done():
        check()
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(0.05, pause * 1.3)
    return True
