"""A load by several ranks: each fills what its module holds, and together they read each byte once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from shardsave._common.memory_errors import check_free_memory
from shardsave._common.progress import Progress
from shardsave._engine.totals import Totals
from shardsave._loading.job import Result
from shardsave._loading.read import TensorReader
from shardsave._ranks.attempt import attempt
from shardsave._ranks.job_reader import JobReader
from shardsave._ranks.unequal import difference, told
from shardsave._state.distributed_tensors import PartReader
from shardsave._storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from shardsave._ranks.session import Session


class LoadJob:
    """The job of one load over ``session``."""

    def __init__(self, session: Session, members: Sequence[int], where: str, verb: str) -> None:
        """``members``: the global rank of each process. ``verb``, ``where``: what is done with which checkpoint, for messages."""
        self.parts = PartReader(members, session.rank)
        self.size = session.size
        self._session = session
        self._where = where
        self._verb = verb

    @property
    def leads(self) -> bool:
        return self._session.leads

    def check_equal(self, arguments: Mapping[str, object]) -> None:
        everywhere = self._session.gather("arguments", told(arguments))
        with self._session.for_all():
            if (words := difference(everywhere or (), self._session.name)) is not None:
                raise ValueError(f"cannot {self._verb} {self._where}: {words}; nothing was loaded")

    @property
    def number(self) -> int:
        return self._session.rank

    @property
    def here(self) -> str:
        return f"{self._session.name(self._session.rank)}: " if len({*self._session.hosts}) > 1 else ""

    def of_all(self, what: str, mine: bytes) -> list[bytes]:
        return self._session.exchange(what, mine)

    def attempt(self, work: Callable[[], Result], identity: Callable[[Result], bytes] = lambda _: b"") -> tuple[Result, bool]:
        return attempt(self._session, "what each has done", work, identity)

    def checked(self, needed: int = 0) -> tuple[str, ...]:
        gathered = self._session.gather("new memory", str(needed).encode())
        of_hosts = Counter[int]()
        for host, data in zip(self._session.hosts, gathered or ()):
            of_hosts[host] += int(data)
        mine = json.dumps([*of_hosts.items()]).encode() if gathered is not None else None
        of_hosts = Counter(dict(json.loads(self._session.publish("new memory of all hosts", mine))))
        if not of_hosts.total():
            return ()
        on_this = of_hosts[self._session.hosts[self._session.rank]]
        notes = check_free_memory(self._where, on_this, "the module is unchanged")
        self._session.gather("whether there is memory", b"")
        self._session.publish("that there is memory", b"" if self._session.leads else None)
        return notes

    def reader(self, checkpoint: Checkpoint, *, verify: bool, progress: Progress) -> TensorReader:
        return JobReader(checkpoint, self._session, verify=verify, progress=progress)

    def ended(self, totals: Totals, shards: Collection[str]) -> tuple[Totals, int]:
        everywhere = self._session.gather("what was read", json.dumps([asdict(totals), *shards]).encode())
        mine = None
        if everywhere is not None:
            joined, of_all = Totals(), set[str]()
            for data in everywhere:
                of_rank, *names = json.loads(data)
                joined = joined.joined(Totals.of(of_rank))
                of_all.update(names)
            mine = json.dumps([asdict(joined), len(of_all)]).encode()
        of_job, count = json.loads(self._session.publish("what all have read", mine))
        return Totals.of(of_job), count
