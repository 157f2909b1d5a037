"""Reads tensors of one checkpoint into all ranks of a job together, and verifies every byte that has a stored checksum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch

from shardsave._common.assembled import Chunk
from shardsave._common.boxes import copy_in
from shardsave._common.derived_layouts import Region
from shardsave._common.gc_pause import gc_paused
from shardsave._common.job_errors import mark_common
from shardsave._common.layouts import Layout, Whole
from shardsave._common.progress import Progress
from shardsave._common.spread import Spread
from shardsave._common.spread_views import viewed
from shardsave._common.words import count, some
from shardsave._engine.blocks import blocks
from shardsave._engine.transfer import BLOCK_BYTES, Piece, Transfer
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.read import Target, TensorReader, damage_message
from shardsave._ranks.joined_sums import JoinedSums
from shardsave._ranks.load_exchange import LoadExchange, Reading
from shardsave._ranks.places import place_of
from shardsave._ranks.read_plan import Range, plan_reads
from shardsave._ranks.read_requests import Key, ReadRequest, agree_on_requests
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardsave._ranks.session import Session


#: Every rank can have this many shards open at the same time.
_FEW_SHARDS = 16


class _Stored(NamedTuple):
    """A stored tensor of which some rank needs elements, those that ``layout`` says. ``located``: None if this rank needs none of them.

    ``spread``: the elements of this rank.
    """

    shard: str
    offset: int
    layout: Layout
    spread: Spread
    located: Located | None


class _Own(NamedTuple):
    """A range that this rank reads for itself. ``piece``: what receives it; None if it is only summed."""

    range: Range
    piece: Piece


class JobReader(TensorReader):
    """As `TensorReader`. `read_together` is called by every rank of ``session``; each byte is then read by one of them."""

    def __init__(self, checkpoint: Checkpoint, session: Session, *, verify: bool, progress: Progress) -> None:
        super().__init__(checkpoint, verify=verify, progress=progress)
        self._session = session

    def read_together(self, targets: Sequence[Target]) -> None:
        """Fills ``targets``. Raises CorruptCheckpointError on all ranks if checksums are wrong, once all targets have been filled."""
        rank, size = self._session.rank, self._session.size
        with gc_paused():
            empty = [target for target in targets if not target[0].nbytes]  # each begins where the tensor after it does
            mine, again = _by_key([target for target in targets if target[0].nbytes] if empty else targets)
            wants = {key: ReadRequest(located.dtype, spread.layout) for key, (located, spread) in mine.items()}
        wants = agree_on_requests(self._session, wants)
        with gc_paused():
            plan = plan_reads(wants, rank, size, every_byte=self._verify)
            stored = _all_stored(wants, mine, rank)
            own = _sorted(plan.alone, _places(stored, plan.alone), plan.unneeded)
        sums = JoinedSums(len(stored))
        if any(plan.common):
            self._read_common(stored, plan.common, own, sums)
        else:
            self._read_own(stored, own, sums)
        self.tensors += len(mine)
        if self._verify:
            self._compare(stored, sums, (one.number for one in chain(plan.common[rank], map(attrgetter("range"), own))))
        if empty:
            self.read(empty)
        for target in again:
            if _copied(mine, *target):
                self.tensors += 1
            else:
                self.read([target])

    def is_of_job(self, error: Exception) -> bool:
        try:
            self._session.check()
        except Exception as known:
            return known is error
        return False

    def _tick(self, done: int) -> None:
        self._session.check()
        super()._tick(done)

    def _read_common(
        self, stored: Sequence[_Stored], common: Sequence[Sequence[Range]], own: Sequence[_Own], sums: JoinedSums
    ) -> None:
        """Reads what several ranks need, for each rank the ranges that it reads in ``common``, and exchanges it while it is read.

        ``own``: what this rank reads for itself, at the same time.
        """
        shards = sorted({one.shard for one in stored})
        step = self._session_allowance() if len(shards) > _FEW_SHARDS else _FEW_SHARDS
        for first in range(0, len(shards), step):
            group = shards[first : first + step]
            held = {*group}
            of_ranks = [[one for one in ranges if stored[one.number].shard in held] for ranges in common]
            ours = [one for one in own if stored[one.range.number].shard in held]
            if not any(of_ranks):
                self._read_own(stored, ours, sums)
                continue
            readings = [_reading(stored, ranges, group) for ranges in of_ranks]
            mine = [*of_ranks[self._session.rank], *(one.range for one in ours)]
            blocks_of_own = blocks(_extents(stored, [one.range for one in ours], group), BLOCK_BYTES)
            delivering = LoadExchange(self._session, readings, [one.spread for one in stored])
            with closing(delivering.exchange) as exchange:
                exchange.start()
                planned, pieces, windows = delivering.run(blocks_of_own, [one.piece for one in ours])
                transfer = self._transfer(group, planned, pieces, checksum=self._verify, windows=windows)
                exchange.finish()
            self._ended(stored, group, mine, transfer, sums)

    def _ended(
        self, stored: Sequence[_Stored], group: Sequence[str], ranges: Sequence[Range], transfer: Transfer, sums: JoinedSums
    ) -> None:
        """``ranges`` were read, in files of ``group``."""
        self.shards.update(stored[one.number].shard for one in ranges)
        if self._verify:
            sums.add(ranges, [stored[one.number].spread.nbytes for one in ranges], transfer.sums)
        for shard in group:
            self._checkpoint.release(shard)

    def _session_allowance(self) -> int:
        """How many shards every rank can hold open at the same time."""
        gathered = self._session.gather("open files", str(self._checkpoint.allowance).encode())
        least = None if gathered is None else str(min(map(int, gathered))).encode()
        return int(self._session.publish("open files of all", least))

    def _read_own(self, stored: Sequence[_Stored], own: Sequence[_Own], sums: JoinedSums) -> None:
        """Reads what this rank reads for itself."""
        ranges, pieces = [one.range for one in own], [one.piece for one in own]
        shards = sorted({stored[one.number].shard for one in ranges})
        extents = _extents(stored, ranges, shards)
        step = self._checkpoint.allowance
        for first in range(0, len(shards), step):
            group = shards[first : first + step]
            begin, end = np.searchsorted(extents[:, 0], [first, first + step]).tolist()
            extents[begin:end, 0] -= first
            transfer = self._transfer(group, blocks(extents[begin:end], BLOCK_BYTES), pieces[begin:end], checksum=self._verify)
            self._ended(stored, group, ranges[begin:end], transfer, sums)

    def _compare(self, stored: Sequence[_Stored], sums: JoinedSums, read: Iterable[int]) -> None:
        """Compares the checksums with those that are stored. If some differ, all ranks raise the same error. ``read``: the tensors of which
        this rank has read bytes."""
        for number, one in enumerate(stored):
            if one.located is None:
                continue
            if one.located.checksum is None:
                self.verified = None
            elif one.layout.ranks[0] == self._session.rank:
                sums.expect(number, one.located.checksum, one.located.nbytes)
        unknown = [n for n, one in enumerate(stored) if one.located is None or one.located.checksum is None]
        differences = sums.differences(self._session, unknown)
        damaged = [(stored[number].located, difference) for number, difference in differences.items()]
        for located, difference in damaged:
            if located is not None and located.checksum is not None:
                self.damaged.append((located, damage_message(located, located.checksum ^ difference)))
        self.tensors -= len(self.damaged)
        if damaged:
            self._raise_damage(stored[min(differences)], len(damaged) - 1, min(differences) in read)

    def _raise_damage(self, first: _Stored, others: int, is_reader: bool) -> NoReturn:
        """One rank raises the error that all ranks have found. Of several machines, it names those that have read the ``first`` tensor."""
        session = self._session
        readers = [rank for rank, one in enumerate(session.exchange("readers of damage", b"1" if is_reader else b"")) if one]
        if first.layout.ranks[0] == session.rank:
            more = f"; {count(others, 'more tensor')} {'is' if others == 1 else 'are'} damaged" if others else ""
            on = f"; read by {some(map(session.name, readers))}" if len({*session.hosts}) > 1 else ""
            raise mark_common(CorruptCheckpointError(f"{self.damaged[0][1]}{on}{more}"))
        session.exchange("damaged tensors", b"")  # raises the error of that rank
        raise AssertionError("no rank has raised it")


def _by_key(targets: Sequence[Target]) -> tuple[dict[Key, tuple[Located, Spread]], list[Target]]:
    """Where each stored tensor, or chunk of one, begins → it and what is filled of it; and the targets that need the same ones again."""
    first: dict[Key, tuple[Located, Spread]] = {}
    again = []
    dtypes = {dtype: BY_NAME[dtype].torch for dtype in {located.dtype for located, _ in targets}}
    for target in targets:
        located, into = target
        if isinstance(into, Spread) and not located.chunks and into.dtype == dtypes[located.dtype]:  # most are like this
            pair = located, into
            if first.setdefault((located.shard, located.offset), pair) is not pair:
                again.append(target)
            continue
        parts = [((part.shard, part.offset), part, spread) for part, spread in _chunks(*target) if part.nbytes]
        if any(key in first for key, _, _ in parts):
            again.append(target)
            continue
        first.update((key, (located, spread)) for key, located, spread in parts)
    return first, again


def _copied(mine: Mapping[Key, tuple[Located, Spread]], located: Located, into: torch.Tensor | Spread | None) -> bool:
    """Fills ``into`` from what this rank has of the same stored tensor elsewhere. Returns False if it has other elements, or cast ones."""
    if located.chunks:
        return False
    ((_, spread),) = _chunks(located, into)
    _, first = mine[located.shard, located.offset]
    pairs = [(a.tensor, b.tensor) for a, b in zip(first.local, spread.local)]
    if first.layout != spread.layout or any(source.dtype not in (first.dtype, target.dtype) for source, target in pairs):
        return False
    for source, target in pairs:
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            copy_in(source, target)
    return True


def _chunks(located: Located, into: torch.Tensor | Spread | None) -> Iterator[tuple[Located, Spread]]:
    dtype = BY_NAME[located.dtype].torch
    if isinstance(into, torch.Tensor):
        local = (Chunk((0,) * into.dim(), into),) if into.numel() else ()
        into = Spread(dtype, Whole((), torch_shape(located.dtype, located.shape)), local)
    assert into is not None
    spread = into if into.dtype == dtype else into.cast(dtype)
    if not located.chunks:
        yield located, spread
    for begin, chunk in located.chunks:
        yield chunk, viewed(spread, Region.box(begin, chunk.shape))


def _all_stored(wants: Mapping[Key, ReadRequest], mine: Mapping[Key, tuple[Located, Spread]], rank: int) -> list[_Stored]:
    all_stored = []
    checked: set[tuple[int, int]] = set()  # pairs of layouts: that of all ranks, and that of this one
    for (shard, offset), (dtype, layout) in wants.items():
        if (pair := mine.get((shard, offset))) is None:
            all_stored.append(_Stored(shard, offset, layout, Spread(BY_NAME[dtype].torch, layout, ()), None))
            continue
        located, spread = pair
        if (known := (id(layout), id(spread.layout))) not in checked:
            checked.add(known)
            held = [(*chunk.tensor.shape,) for chunk in spread.local]
            assert [sizes for _, sizes in layout.boxes(rank)] == held, located.name  # nothing here would be left unfilled
        if spread.layout is not layout:
            spread = Spread(spread.dtype, layout, spread.local)
        all_stored.append(_Stored(shard, offset, layout, spread, located))
    return all_stored


def _places(stored: Sequence[_Stored], ranges: Sequence[Range]) -> list[Piece]:
    return [place_of(stored[one.number].spread, one.begin, one.end) for one in ranges]


def _sorted(alone: Sequence[Range], places: Sequence[Piece], unneeded: Sequence[Range]) -> list[_Own]:
    """What one rank reads for itself, in the order of files and offsets."""
    own = [*map(_Own, alone, places), *(_Own(one, None) for one in unneeded)]
    return sorted(own, key=attrgetter("range"))


def _reading(stored: Sequence[_Stored], ranges: Sequence[Range], shards: Sequence[str]) -> Reading:
    return Reading(_extents(stored, ranges, shards), [one.number for one in ranges], [one.begin for one in ranges])


def _extents(stored: Sequence[_Stored], ranges: Sequence[Range], shards: Sequence[str]) -> NDArray[np.int64]:
    """Where ``ranges`` are, as `blocks` takes it; a file's number is its position in ``shards``."""
    number = {shard: position for position, shard in enumerate(shards)}
    all_stored = ((stored[one.number], one) for one in ranges)
    rows = ((number[t.shard], t.offset + one.begin, one.end - one.begin, t.spread.dtype.itemsize) for t, one in all_stored)
    return np.fromiter(chain.from_iterable(rows), np.int64, 4 * len(ranges)).reshape(-1, 4)
