"""The processes that write one checkpoint together, as one of them sees them. Most saves have a job of one process: `ALONE`."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol, TypeVar

from shardsave._engine.totals import Totals
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._saving.comparison import Comparison, InThisProcess
from shardsave._saving.contents import Contents, PlannedDirectory
from shardsave._saving.disk_layout import DiskLayout, OnDisk
from shardsave._saving.frozen import FrozenMemory, remember
from shardsave._saving.packings import Packings
from shardsave._saving.shards import PlannedShard, ShardFiles, Supply
from shardsave._saving.training_directory import DescribedTraining, plan_described
from shardsave._saving.watch import Watch
from shardsave._state.distributed_tensors import PartReader
from shardsave._state.module import State
from shardsave._storage.transaction import CommitOutcome, Transaction

Result = TypeVar("Result")

#: What messages call the names, dtypes, shapes and order of all tensors on disk.
LAYOUT = "layout on disk"


class Names(NamedTuple):
    """The names of the files of a save. ``shards``: of the weights. ``all``: of all files but documents that this process stages."""

    shards: list[str]
    extra: list[str]
    folders: list[str]
    all: list[str]


class Prepared(NamedTuple):
    """What is known before a shard is written: the contents with the shards as they will be, the names of all files, the shards that are
    taken over from an earlier checkpoint, by name, and notes for the report. ``kept``: the shards of the earlier checkpoint that stay as
    they are; some of them may be written again all the same."""

    contents: Contents
    names: Names
    taken: Mapping[str, PlannedShard]
    notes: list[str]
    kept: Sequence[PlannedShard] = ()

    @property
    def to_write(self) -> dict[str, PlannedShard]:
        """The shards that must be written, by name, in the order of `all_shards`."""
        contents, names = self.contents, self.names
        shards = dict(zip([*names.shards, *names.extra], [*contents.shards, *contents.extra_shards]))
        shards.update(
            (f"{folder}/{file}", shard)
            for folder, part in zip(names.folders, contents.directories)
            for file, shard in part.shards.items()
        )
        return {name: shard for name, shard in shards.items() if name not in self.taken}

    @property
    def documents(self) -> dict[str, bytes]:
        """The documents of this process in directories of parts, by name."""
        folders = zip(self.names.folders, self.contents.directories)
        return {f"{folder}/{file}": document for folder, part in folders for file, document in part.documents.items()}


class Share(NamedTuple):
    """The ``shards`` that one process writes, by name, and what brings the bytes of others in them. ``apart``: more of them, of which it
    has all bytes itself. ``documents``: that it writes among the shards; others are staged before the commit."""

    shards: Mapping[str, PlannedShard]
    supply: Supply | None = None
    apart: Mapping[str, PlannedShard] = {}
    documents: Mapping[str, bytes] = {}


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


class Said(NamedTuple):
    """What one process has read of what is saved, and the layout that it will have on disk."""

    state: State
    training: DescribedTraining | None
    layout: DiskLayout


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
    def parts(self) -> PartReader | None:
        """Reads tensors of which each process holds a part; None if this process is alone."""

    @property
    def packings(self) -> Packings | None:
        """Remembers packings from save to save; None for a process alone, which needs its memory for other things."""

    def attempt(self, work: Callable[[], Result], said: Callable[[Result], Said]) -> Result:
        """What ``work`` returns, once it has succeeded everywhere. One error that it has everywhere names no process.

        ``said``: what `agree`, `plan_training` and `lay_out` will be called with; if it is the same everywhere, they need not ask again.
        """

    def agree(self, state: State) -> State:
        """The state of all processes together: on each the same. ``state``: that of this one."""

    def lay_out(self, layout: DiskLayout, state: State) -> OnDisk:
        """``state``, which is the same everywhere, in ``layout``."""

    def plan_training(self, training: DescribedTraining | None, max_shard_size: int) -> Sequence[PlannedDirectory]:
        """The directory of the training state, or none; all or no process has described one. It lacks the files of others."""

    def complete(self, contents: Contents) -> Contents:
        """``contents`` with the files that other processes write into directories."""

    def check_replicas(self, contents: Contents) -> Contents:
        """Compares what several processes have of ``contents``, and of the training state as it was when it was planned. Returns contents
        in which one has each. Raises UnsupportedTensorError."""

    def claim(self, directory: str, step: int | None) -> None:
        """Called before anything is planned: raises SaveNotCommittedError if other processes of a larger job have just made this save."""

    def for_all(self) -> AbstractContextManager[None]:
        """Within it, this process does something for all, or all do the same: an error then names no rank."""

    def check_equal(self, arguments: Mapping[str, object], tensors: Callable[[], Mapping[str, str]]) -> None:
        """Raises ValueError if ``arguments``, by the name that a message has for them, are not the same everywhere: JSON values, which
        the message shows if they are short, and digests as bytes. ``tensors``: returns what each tensor is on disk, by name, for a message
        about `LAYOUT`."""

    def watch(self, watch: Watch) -> Watch:
        """``watch``, which also ends the save if another process fails."""

    def files(self, transaction: Transaction) -> AbstractContextManager[ShardFiles]:
        """Where shards are created: where this process leads, the transaction, which is entered. Elsewhere nothing can be created before
        `stage`."""

    def prepare(
        self, contents: Contents, work: Callable[[Comparison], Prepared], frozen: Mapping[str, FrozenMemory], watch: Watch
    ) -> Prepared:
        """What ``work`` returns where this process leads, with the sources of each process. ``contents``: as they were planned, everywhere
        the same. ``work`` gets the comparison of all processes with an earlier checkpoint. ``frozen``: name on disk → memory of this
        process that may be assumed to be unchanged.
        """

    def share(self, to_write: Mapping[str, PlannedShard], documents: Mapping[str, bytes]) -> AbstractContextManager[Share]:
        """Those of the shards that this process writes, within the context. ``documents``: those of this process in directories."""

    def stage(self, work: Callable[[], object]) -> None:
        """Lets the process that leads do ``work``; after that, shards can be created."""

    def collect(self, written: Written) -> Written:
        """Called when all shards of this process are sealed. Where it leads, returns what all have written."""

    def commit(self, work: Callable[[], Committed]) -> Committed:
        """Lets the process that leads do ``work``, and returns the result everywhere."""

    def remember(self, frozen: Mapping[str, FrozenMemory], sums_of: Callable[[Container[str]], Mapping[str, int]]) -> None:
        """Called after the commit: notes what the memory ``frozen`` had. ``sums_of``: what this process has stored, name → checksum."""


class Alone:
    """A job of one process."""

    leads = True
    size = 1
    parts = None
    packings = None

    def attempt(self, work: Callable[[], Result], said: Callable[[Result], Said]) -> Result:
        return work()

    def agree(self, state: State) -> State:
        return state

    def lay_out(self, layout: DiskLayout, state: State) -> OnDisk:
        return layout.apply(state)

    def plan_training(self, training: DescribedTraining | None, max_shard_size: int) -> Sequence[PlannedDirectory]:
        return [plan_described(training, max_shard_size)] if training is not None else []

    def complete(self, contents: Contents) -> Contents:
        return contents

    def check_replicas(self, contents: Contents) -> Contents:
        return contents

    def claim(self, directory: str, step: int | None) -> None:
        pass

    def for_all(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check_equal(self, arguments: Mapping[str, object], tensors: Callable[[], Mapping[str, str]]) -> None:
        pass

    def watch(self, watch: Watch) -> Watch:
        return watch

    def files(self, transaction: Transaction) -> AbstractContextManager[ShardFiles]:
        return transaction

    def prepare(
        self, contents: Contents, work: Callable[[Comparison], Prepared], frozen: Mapping[str, FrozenMemory], watch: Watch
    ) -> Prepared:
        return work(InThisProcess(frozen, watch))

    def share(self, to_write: Mapping[str, PlannedShard], documents: Mapping[str, bytes]) -> AbstractContextManager[Share]:
        return nullcontext(Share(to_write))

    def stage(self, work: Callable[[], object]) -> None:
        work()

    def collect(self, written: Written) -> Written:
        return written

    def commit(self, work: Callable[[], Committed]) -> Committed:
        return work()

    def remember(self, frozen: Mapping[str, FrozenMemory], sums_of: Callable[[Container[str]], Mapping[str, int]]) -> None:
        remember(frozen, sums_of(frozen))


ALONE = Alone()
