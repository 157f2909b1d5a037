"""The processes that write one checkpoint together, as one of them sees them. Most saves have a job of one process: `ALONE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from shardsave._engine.totals import Totals
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._saving.contents import Contents
from shardsave._saving.shards import PlannedShard, ShardFiles, Supply, UnchangedShard
from shardsave._saving.watch import Watch
from shardsave._state.distributed_tensors import Parts
from shardsave._state.module import State
from shardsave._storage.transaction import CommitOutcome, Transaction


class Names(NamedTuple):
    """The names of the files of a save. ``shards``: of the weights. ``all``: of all files with tensors, in the order of `all_shards`."""

    shards: list[str]
    extra: list[str]
    folders: list[str]
    all: list[str]


class Prepared(NamedTuple):
    """What is known before a shard is written: the contents with the shards as they will be, the names of all files, the shards that are
    taken over from an earlier checkpoint, by name, and notes for the report."""

    contents: Contents
    names: Names
    taken: Mapping[str, UnchangedShard]
    notes: list[str]

    @property
    def to_write(self) -> dict[str, PlannedShard]:
        """The shards that must be written, by name."""
        return {name: shard for name, shard in zip(self.names.all, self.contents.all_shards) if name not in self.taken}


class Share(NamedTuple):
    """The ``shards`` that one process writes, by name, and what brings the bytes of others in them."""

    shards: Mapping[str, PlannedShard]
    supply: Supply | None = None


class Written(NamedTuple):
    """What became of shards, by name: what the index records of them, and of whole files. ``totals``: of the runs that wrote them."""

    records: Mapping[str, ShardRecord]
    file_records: Mapping[str, FileRecord]
    totals: Totals


class Committed(NamedTuple):
    """What is known after the commit. ``tensors``: in the index. ``directory_bytes``: of all files in the directories of parts.
    ``totals``: of all processes."""

    tensors: int
    directory_bytes: int
    outcome: CommitOutcome
    totals: Totals


class Job(Protocol):
    """What `write_checkpoint` asks of the processes that call it together. One of them leads: it does what only one may do.

    Whatever one process raises, all raise.
    """

    @property
    def leads(self) -> bool:
        """Whether this process does what only one may do."""

    @property
    def size(self) -> int:
        """The number of processes."""

    @property
    def parts(self) -> Parts | None:
        """Reads tensors of which each process holds a part; None if this process is alone."""

    def agree(self, state: State) -> State:
        """The state of all processes together: on each the same. ``state``: that of this one."""

    def check_equal(self, arguments: Mapping[str, bytes]) -> None:
        """Raises ValueError if ``arguments``, by the name that a message has for them, are not the same everywhere."""

    def watch(self, watch: Watch) -> Watch:
        """``watch``, which also ends the save if another process fails."""

    def files(self, transaction: Transaction) -> AbstractContextManager[ShardFiles]:
        """Where shards are created: where this process leads, the transaction, which is entered. Elsewhere nothing can be created before
        `stage`."""

    def prepare(self, contents: Contents, work: Callable[[], Prepared]) -> Prepared:
        """What ``work`` returns where this process leads. ``contents``: as they were planned, everywhere the same."""

    def share(self, to_write: Mapping[str, PlannedShard]) -> AbstractContextManager[Share]:
        """Those of the shards that this process writes, within the context."""

    def stage(self, work: Callable[[], object]) -> None:
        """Lets the process that leads do ``work``; after that, shards can be created."""

    def collect(self, written: Written) -> Written:
        """Called when all shards of this process are sealed. Where it leads, returns what all have written."""

    def commit(self, work: Callable[[], Committed]) -> Committed:
        """Lets the process that leads do ``work``, and returns the result everywhere."""


class Alone:
    """A job of one process."""

    leads = True
    size = 1
    parts = None

    def agree(self, state: State) -> State:
        return state

    def check_equal(self, arguments: Mapping[str, bytes]) -> None:
        pass

    def watch(self, watch: Watch) -> Watch:
        return watch

    def files(self, transaction: Transaction) -> AbstractContextManager[ShardFiles]:
        return transaction

    def prepare(self, contents: Contents, work: Callable[[], Prepared]) -> Prepared:
        return work()

    def share(self, to_write: Mapping[str, PlannedShard]) -> AbstractContextManager[Share]:
        return nullcontext(Share(to_write))

    def stage(self, work: Callable[[], object]) -> None:
        work()

    def collect(self, written: Written) -> Written:
        return written

    def commit(self, work: Callable[[], Committed]) -> Committed:
        return work()


ALONE = Alone()
