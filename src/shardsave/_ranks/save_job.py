"""A save by several ranks: rank 0 does what only one process may do, each rank writes the files that it owns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from shardsave._common.os_calls import CallFailed
from shardsave._common.sources import ByteSource
from shardsave._common.spread import Spread
from shardsave._engine.totals import Totals
from shardsave._format.index import FileRecord, ShardRecord
from shardsave._ranks.agree import agree
from shardsave._ranks.failures import StoreLost, failure_of, unpacked
from shardsave._ranks.owners import owners
from shardsave._ranks.replicas import check_replicas
from shardsave._ranks.session import Session
from shardsave._ranks.shipping import Shipping
from shardsave._ranks.training import plan_training
from shardsave._saving.contents import Contents
from shardsave._saving.disk_layout import DiskLayout, OnDisk
from shardsave._saving.job import Committed, Names, Prepared, Share, Written
from shardsave._saving.shards import PlannedShard, ShardFiles
from shardsave._saving.training_directory import DescribedTraining, PlannedTraining
from shardsave._saving.watch import Watch
from shardsave._state.distributed_tensors import Parts
from shardsave._state.module import State
from shardsave._storage.commit_errors import rank_lost_after_commit, rank_lost_in_commit
from shardsave._storage.joined import Invitation, Joined
from shardsave._storage.transaction import CommitOutcome, Transaction
from shardsave.errors import DurabilityUncertainError, SaveNotCommittedError, ShardSaveError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


#: What rank 0 publishes: that nothing can end the save any more, since it renames the index now; and what came of it.
_BEGINS, _OUTCOME = "begin of the commit", "outcome of the commit"

#: What rank 0 publishes of the layout on disk, where names and tensors stay as they are.
_LAYOUT, _KEPT = "layout on disk", b"kept"

#: Begins an outcome that is an error.
_FAILED = b"!"

#: For so many seconds a rank that was not told the outcome looks whether the new index appears, and how often.
_PATIENCE, _PAUSE = 2.0, 0.02


class JobFailed(ShardSaveError):
    """A rank was lost, interrupted, or failed in a way that has no class of its own."""


class SaveJob:
    """The job of one save over ``session``, whose ranks all plan the same contents."""

    def __init__(
        self,
        session: Session,
        members: Sequence[int],
        where: str,
        *,
        durable: bool,
        on_divergence: Literal["raise", "lowest_rank"],
    ) -> None:
        """``members``: the global rank of each process. ``where``: the directory, for messages."""
        self.parts = Parts(members, session.rank)
        self.size = session.size
        self._session = session
        self._where = where
        self._durable = durable
        self._on_divergence = on_divergence
        self._transaction: Transaction | None = None  # where this rank leads
        self._joined: Joined | None = None  # where it does not
        self._watch: Watch | None = None
        self._mine: set[str] = set()
        self._shipping: Shipping | None = None
        self._all: list[str] = []
        self._begun = False  # whether the index may have been renamed

    @property
    def session(self) -> Session:
        return self._session

    @property
    def leads(self) -> bool:
        return self._session.leads

    def agree(self, state: State) -> State:
        state, notes = check_replicas(self._session, agree(self._session, state), self._on_divergence)
        return state._replace(notes=(*state.notes, *notes))

    def lay_out(self, layout: DiskLayout, state: State) -> OnDisk:
        if self.leads:
            on_disk = layout.apply(state)
            self._session.publish(_LAYOUT, _KEPT if on_disk.keeps(state) else b"")
            return on_disk
        return layout.apply(state, is_kept=self._session.publish(_LAYOUT) == _KEPT)

    def plan_training(self, training: DescribedTraining | None, max_shard_size: int) -> PlannedTraining:
        return plan_training(self._session, training, max_shard_size, self._on_divergence)

    def check_equal(self, arguments: Mapping[str, bytes]) -> None:
        mine = {name: value.hex() for name, value in arguments.items()}
        everywhere = self._session.gather("arguments", json.dumps(mine).encode())
        first = {data: rank for rank, data in reversed([*enumerate(everywhere or ())])}  # nearly all ranks say the same
        for data, rank in sorted(first.items(), key=itemgetter(1)):
            for name, value in json.loads(data).items():
                if value != mine[name]:
                    raise ValueError(
                        f"cannot save to {self._where}: the same {name} was expected on all ranks, {self._session.name(rank)} has "
                        f"another than {self._session.name(0)}; nothing was written"
                    )

    def watch(self, watch: Watch) -> Watch:
        self._watch, self._session.watch = watch, watch.check
        return _JobWatch(watch, self._session, self.begin_commit)

    @contextmanager
    def files(self, transaction: Transaction) -> Iterator[ShardFiles]:
        try:
            if self._session.leads:
                with transaction:
                    self._transaction = transaction
                    yield from self._telling(transaction)
            else:
                with closing(Joined(transaction.path, durable=self._durable)) as joined:
                    self._joined = joined
                    yield from self._telling(joined)
        finally:
            if self._shipping is not None:
                self._shipping.close()

    def _telling(self, files: ShardFiles) -> Iterator[ShardFiles]:
        """Other ranks are told of an error before this one removes what it has made, so that they end what they are doing."""
        try:
            yield files
        except BaseException as error:
            raised = self._session.fail(error)
            if raised is error:
                raise
            raise raised from error

    def prepare(self, contents: Contents, work: Callable[[], Prepared]) -> Prepared:
        if self._session.leads:
            prepared = work()
            self._session.publish("names of files", json.dumps([prepared.names, prepared.notes]).encode())
        else:
            names, notes = json.loads(self._session.publish("names of files"))
            prepared = Prepared(contents, Names(*names), {}, notes)
        self._all = prepared.names.all
        return prepared

    @contextmanager
    def share(self, to_write: Mapping[str, PlannedShard], documents: Mapping[str, bytes]) -> Iterator[Share]:
        # In the directories of parts, a rank has files of its own, which it alone has planned. They have no spread tensors.
        apart = {name: shard for name, shard in to_write.items() if "/" in name and not _is_spread(shard)}
        names = [name for name in to_write if name not in apart]
        shards = [to_write[name] for name in names]
        of_shard = owners(shards, self._session.hosts)
        self._shipping = shipping = Shipping(self._session, shards, of_shard)
        own = {names[number]: shard for number, shard in zip(shipping.mine, shipping.own)}
        self._mine = {*own, *apart}
        try:
            yield Share(own, shipping, apart, {} if self.leads else documents)
            shipping.finish()
        except BaseException:
            shipping.close()
            raise

    def stage(self, work: Callable[[], object]) -> None:
        assert self._shipping is not None
        self._shipping.start()  # the first windows are filled while rank 0 stages
        if self._transaction is not None:
            work()
            invitation = self._transaction.invite([name for name in self._all if name not in self._mine])
            self._session.publish("staging directory", invitation.encode())
        else:
            assert self._joined is not None
            invitation = Invitation.decode(self._session.publish("staging directory"))
            self._joined.join(invitation, self._session.name(0), self._session.check)

    def collect(self, written: Written) -> Written:
        if self._watch is not None and not self.leads:
            self._watch.attempt_commit()  # a rank that has voted cannot end the save any more
            self._session.watch = None
        votes = self._session.gather("finished files", _encode_written(written))
        if self._shipping is not None and not self.leads:
            self._shipping.close()  # while rank 0 commits; to free the windows takes as long as to write some of them
        return written if votes is None else _joined(map(_decode_written, dict.fromkeys(votes)))

    def commit(self, work: Callable[[], Committed]) -> Committed:
        if self._session.leads:
            committed = self._outcome(work)
            self._publish_outcome(_encode_committed(committed))
            return committed
        try:
            self._session.publish(_BEGINS)
        except StoreLost as error:
            raise self._what_became(error) from error
        try:
            outcome = self._session.publish(_OUTCOME)
        except (JobFailed, StoreLost) as error:
            raise self._what_became(error) from error
        if outcome[:1] == _FAILED:
            raise unpacked(outcome[1:]).error(SaveNotCommittedError)
        return _decode_committed(outcome)

    def begin_commit(self) -> None:
        """Called where this rank leads, right before the rename. If it returns, no other rank can end the save any more."""
        self._session.watch = None
        self._session.publish(_BEGINS, b"")
        self._begun = True

    def _outcome(self, work: Callable[[], Committed]) -> Committed:
        try:
            return work()
        except Exception as error:
            if self._begun:
                failure = failure_of(error, self._session.name(0))
                with suppress(JobFailed, StoreLost):
                    self._session.publish(_OUTCOME, _FAILED + failure.packed())
            raise

    def _publish_outcome(self, outcome: bytes) -> None:
        try:
            self._session.publish(_OUTCOME, outcome)
        except (JobFailed, StoreLost) as error:
            raise rank_lost_after_commit(self._where, error) from error

    def _what_became(self, error: ShardSaveError) -> DurabilityUncertainError:
        """The error for a rank that was not told whether the commit took effect: what the index proves."""
        assert self._joined is not None
        end = time.monotonic() + _PATIENCE
        while True:
            with suppress(CallFailed):
                if self._joined.is_in_index(self._all[0]):
                    return rank_lost_after_commit(self._where, error)
            if time.monotonic() > end:
                return rank_lost_in_commit(self._where, error)
            time.sleep(_PAUSE)


def _is_spread(shard: PlannedShard) -> bool:
    return any(isinstance(piece, Spread) for piece in shard.pieces)


class _JobWatch:
    """The watch over one rank of the save."""

    def __init__(self, watch: Watch, session: Session, begin_commit: Callable[[], None]) -> None:
        self.workers = watch.workers
        self.beside_training = watch.beside_training
        self._watch = watch
        self._session = session
        self._begin_commit = begin_commit

    def check(self) -> None:
        self._watch.check()
        self._session.check()

    def attempt_commit(self) -> None:
        self._watch.attempt_commit()
        self._begin_commit()

    def is_urgent(self, pieces: Sequence[ByteSource]) -> bool:
        """Shards are written in the order that all ranks know."""
        return False

    def begin_reading(self, pieces: Sequence[ByteSource]) -> NDArray[np.int64] | None:
        return self._watch.begin_reading(pieces)

    def end_reading(self, pieces: Sequence[ByteSource], sums: Sequence[int]) -> None:
        self._watch.end_reading(pieces, sums)


def _encode_written(written: Written) -> bytes:
    return json.dumps([written.records, written.file_records, asdict(written.totals)]).encode()


def _decode_written(data: bytes) -> Written:
    records, file_records, totals = json.loads(data)
    return Written(
        {name: ShardRecord(*record) for name, record in records.items()},
        {name: FileRecord(*record) for name, record in file_records.items()},
        _totals(totals),
    )


def _totals(fields: dict[str, Any]) -> Totals:
    return Totals(**{**fields, "notes": tuple(fields["notes"])})


def _joined(parts: Iterator[Written]) -> Written:
    """What all ranks have written."""
    records: dict[str, ShardRecord] = {}
    file_records: dict[str, FileRecord] = {}
    totals = Totals()
    for part in parts:
        records.update(part.records)
        file_records.update(part.file_records)
        totals = totals.joined(part.totals)
    return Written(records, file_records, totals)


def _encode_committed(committed: Committed) -> bytes:
    tensors, directory_bytes, outcome, totals = committed
    return json.dumps([tensors, directory_bytes, outcome, asdict(totals)]).encode()


def _decode_committed(data: bytes) -> Committed:
    tensors, directory_bytes, outcome, totals = json.loads(data)
    return Committed(tensors, directory_bytes, CommitOutcome(*map(tuple, outcome)), _totals(totals))
