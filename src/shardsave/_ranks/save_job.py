"""A save by several ranks: rank 0 does what only one process may do, each rank writes the files that it owns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Literal

from shardsave._common.gc_pause import gc_paused
from shardsave._common.layouts import Extent
from shardsave._common.spread import Spread
from shardsave._engine.transfer import TransferFault
from shardsave._ranks.agree import Said as SaidOfState
from shardsave._ranks.agree import agree, say
from shardsave._ranks.attempt import attempt
from shardsave._ranks.claims import Claims, claims_of
from shardsave._ranks.commit import JobCommit
from shardsave._ranks.comparison import AmongRanks
from shardsave._ranks.equality import Unequal, check_equal
from shardsave._ranks.file_owners import file_owners
from shardsave._ranks.job_watch import JobWatch
from shardsave._ranks.replicas import check_replicas, compare_replicas
from shardsave._ranks.save_exchange import SaveExchange
from shardsave._ranks.save_messages import (
    decode_prepared,
    decode_written,
    encode_prepared,
    encode_written,
    joined,
)
from shardsave._ranks.session import Session
from shardsave._ranks.training import TRAINING, OwnTraining, plan_training, state_of, with_other_files
from shardsave._ranks.values import pack
from shardsave._saving.comparison import Comparison
from shardsave._saving.contents import Contents, PlannedDirectory
from shardsave._saving.disk_layout import DiskLayout, IdentityLayout, OnDisk
from shardsave._saving.frozen import FrozenMemory
from shardsave._saving.job import LAYOUT, Committed, Prepared, Result, Said, Share, Written
from shardsave._saving.packings import Packings
from shardsave._saving.shards import PlannedShard, ShardFiles, fault_before_writing
from shardsave._saving.training_directory import DescribedTraining
from shardsave._saving.watch import Watch
from shardsave._state.distributed_tensors import PartReader
from shardsave._state.module import Entry, State
from shardsave._storage.joined import Invitation, Joined
from shardsave._storage.transaction import Transaction

#: What rank 0 publishes before anything is written: questions about tensors and files, then what all will write.
_PLAN, _ASKED = "plan of the files", b"?"

#: What rank 0 publishes of the layout on disk, where names and tensors stay as they are; its fingerprint follows.
_KEPT = b"kept"


#: How this process has packed the tensors of its last collective save.
_packings = Packings()


class SaveJob:
    """The job of one save over ``session``, whose ranks all plan the same contents."""

    packings = _packings

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
        self.parts = PartReader(members, session.rank)
        self.size = session.size
        self._session = session
        self._where = where
        self._commit = JobCommit(session, where)
        self._durable = durable
        self._on_divergence = on_divergence
        self._transaction: Transaction | None = None  # where this rank leads
        self._joined: Joined | None = None  # where it does not
        self._watch: Watch | None = None
        self._mine: set[str] = set()
        self._shipping: SaveExchange | None = None
        self._comparison: AmongRanks | None = None
        self._all: list[str] = []
        self._to_write: list[str] = []
        self._said: tuple[SaidOfState | None, SaidOfState | None] = None, None  # of the state and the training state
        self._is_alike = False  # whether all ranks say the same
        self._is_plain = False  # whether all store the same under the same names
        self._training: OwnTraining | None = None
        self._known: Callable[[], Mapping[tuple[int, Extent], int]] = dict  # as in `Checked`
        self._claims: Claims | None = None  # where this rank leads

    @property
    def session(self) -> Session:
        return self._session

    @property
    def leads(self) -> bool:
        return self._session.leads

    def attempt(self, work: Callable[[], Result], said: Callable[[Result], Said]) -> Result:
        def identity(result: Result) -> bytes:
            state, training, layout = said(result)
            self._said = say(state), None if training is None else say(state_of(training), TRAINING)
            shared = b"" if training is None else hashlib.sha256(training.shared).digest()
            return hashlib.sha256(
                pack([type(layout).__name__.encode(), shared, *(one.header for one in self._said if one is not None)])
            ).digest()

        result, self._is_alike = attempt(self._session, "what each has read", work, identity)
        return result

    def claim(self, directory: str, step: int | None) -> None:
        """Called once the ``directory`` is known: rank 0 looks whether other ranks of the job have just made the same save."""
        if self.leads:
            with self._session.for_all():
                self._claims = claims_of(directory, self._session.names)
                if self._claims is not None:
                    self._claims.begin(step)

    def agree(self, state: State) -> State:
        said, self._said = self._said[0], (None, self._said[1])
        with self._session.for_all():
            return agree(self._session, state, said=said, all_say_the_same=self._is_alike)

    def lay_out(self, layout: DiskLayout, state: State) -> OnDisk:
        self._is_plain = self._is_alike and type(layout) is IdentityLayout
        if self._is_plain:
            return layout.apply(state)
        with self._session.for_all():
            if self.leads:
                on_disk = layout.apply(state)
                self._session.publish(LAYOUT, _KEPT + layout.fingerprint() if on_disk.keeps(state) else b"")
                return on_disk
            return layout.apply(state, is_kept=self._session.publish(LAYOUT) == _KEPT + layout.fingerprint())

    def plan_training(self, training: DescribedTraining | None, max_shard_size: int) -> Sequence[PlannedDirectory]:
        said, self._said = self._said[1], (self._said[0], None)
        with self._session.for_all():
            self._training = plan_training(self._session, training, max_shard_size, said, all_say_the_same=self._is_alike)
        return [self._training.directory] if self._training is not None else []

    def complete(self, contents: Contents) -> Contents:
        training = self._training
        if training is None:
            return contents
        with self._session.for_all():
            own = next(one for one in contents.directories if one.role == training.directory.role)
            full = with_other_files(self._session, training, own)
            return contents.with_directories([full if one is own else one for one in contents.directories])

    def check_replicas(self, contents: Contents) -> Contents:
        extra = [(name, piece) for shard in contents.extra_shards for name, piece in zip(shard.names, shard.pieces)]
        entries = [*contents.state.entries, *(Entry(name, "buffer", None, None, piece) for name, piece in extra)]
        entries = [entry for entry in entries if isinstance(entry.source, Spread)]
        spread = contents.state._replace(entries=tuple(entries))
        with self._session.for_all():
            state, notes, self._known = check_replicas(self._session, spread, self._on_divergence)
            if self._training is not None:  # the lowest rank writes each box of it anyway
                notes = (*notes, *compare_replicas(self._session, self._training.sums, self._on_divergence, of_training=True))
        contents = contents._replace(notes=(*contents.notes, *notes))
        if state is spread:
            return contents
        lowest = {id(old.source): new.source for old, new in zip(entries, state.entries) if old.source is not new.source}
        return contents.with_sources(lowest)

    def for_all(self) -> AbstractContextManager[None]:
        return self._session.for_all()

    def check_equal(self, arguments: Mapping[str, object], tensors: Callable[[], Mapping[str, str]]) -> None:
        try:
            check_equal(self._session, arguments, None if self._is_plain else tensors)
        except Unequal as error:
            with self._session.for_all():
                raise ValueError(f"cannot save to {self._where}: {error}; nothing was written") from None

    def watch(self, watch: Watch) -> Watch:
        self._watch, self._session.watch = watch, watch.check
        return JobWatch(watch, self._session, self._commit.begin)

    @contextmanager
    def files(self, transaction: Transaction) -> Iterator[ShardFiles]:
        try:
            if self._session.leads:
                with ExitStack() as stack:
                    with self._session.for_all():
                        stack.enter_context(transaction)
                    self._transaction = transaction
                    yield from self._telling(transaction)
            else:
                with closing(Joined(transaction.path, durable=self._durable)) as joined:
                    self._joined = joined
                    yield from self._telling(joined)
        finally:
            if self._shipping is not None:
                self._shipping.exchange.close()

    def _telling(self, files: ShardFiles) -> Iterator[ShardFiles]:
        """Other ranks are told of an error before this one removes what it has made, so that they end what they are doing."""
        try:
            yield files
        except BaseException as error:
            raised = self._session.fail(error)
            if raised is error:
                raise
            raise raised from error

    def prepare(
        self, contents: Contents, work: Callable[[Comparison], Prepared], frozen: Mapping[str, FrozenMemory], watch: Watch
    ) -> Prepared:
        comparison = AmongRanks(
            self._session, contents, frozen, watch, lambda what: self._session.publish(_PLAN, _ASKED + what), self._known
        )
        if self.leads:
            with self._session.for_all():
                notes = self._claims.check(contents.moment.step) if self._claims is not None else []
                prepared = work(comparison)
                prepared = prepared._replace(notes=[*prepared.notes, *notes])
            self._session.publish(_PLAN, encode_prepared(prepared, contents))
        else:
            while (plan := self._session.publish(_PLAN)).startswith(_ASKED):
                self._answer(comparison, plan[len(_ASKED) :])
            with gc_paused():
                prepared = decode_prepared(plan, contents)
        self._comparison = comparison
        self._all = prepared.names.all
        self._to_write = [name for name in self._all if name not in prepared.taken]
        return prepared

    def _answer(self, comparison: AmongRanks, question: bytes) -> None:
        assert self._joined is not None
        try:
            comparison.answer(question)
        except TransferFault as fault:
            raise fault_before_writing(self._joined, fault) from fault

    def remember(self, frozen: Mapping[str, FrozenMemory], sums_of: Callable[[Container[str]], Mapping[str, int]]) -> None:
        if self._comparison is not None:
            self._comparison.remember()

    @contextmanager
    def share(self, to_write: Mapping[str, PlannedShard], documents: Mapping[str, bytes]) -> Iterator[Share]:
        # In the directories of parts, a rank has files of its own, which it alone has planned. They have no spread tensors.
        apart = {name: shard for name, shard in to_write.items() if "/" in name and not _is_spread(shard)}
        names = [name for name in to_write if name not in apart]
        shards = [to_write[name] for name in names]
        with gc_paused():
            self._shipping = shipping = SaveExchange(self._session, shards, file_owners(shards, self._session.hosts))
        own = {names[number]: shard for number, shard in zip(shipping.mine, shipping.own)}
        self._mine = {*own, *apart}
        try:
            yield Share(own, shipping, apart, {} if self.leads else documents)
            shipping.exchange.finish()
        except BaseException:
            shipping.exchange.close()
            raise

    def stage(self, work: Callable[[], object]) -> None:
        assert self._shipping is not None
        self._shipping.exchange.start()  # the first windows are filled while rank 0 stages
        if self._transaction is not None:
            with self._session.for_all():
                work()
                invitation = self._transaction.invite([name for name in self._to_write if name not in self._mine])
            self._session.publish("staging directory", invitation.encode())
        else:
            assert self._joined is not None
            invitation = Invitation.decode(self._session.publish("staging directory"))
            self._joined.join(invitation, self._session.name(0), self._session.check)

    def collect(self, written: Written) -> Written:
        if self._watch is not None and not self.leads:
            self._watch.attempt_commit()  # a rank that has voted cannot end the save any more
            self._session.watch = None
        votes = self._session.gather("finished files", encode_written(written))
        if self._shipping is not None and not self.leads:
            self._shipping.exchange.close()  # while rank 0 commits; to free the windows takes as long as to write some of them
        return written if votes is None else joined(map(decode_written, dict.fromkeys(votes)))

    def commit(self, work: Callable[[], Committed]) -> Committed:
        if self.leads:
            return self._commit.lead(work, self._claims)
        assert self._joined is not None
        joined, first = self._joined, self._all[0]
        return self._commit.follow(lambda: joined.is_in_index(first))


def _is_spread(shard: PlannedShard) -> bool:
    return any(isinstance(piece, Spread) for piece in shard.pieces)
