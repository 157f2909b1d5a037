"""Decides which shards of an earlier checkpoint a save takes over: those whose tensors all have the stored checksums.

The checksums are computed from the memory that would be written, before a byte is written. A header is a function of the tensors, so the
earlier shard is then byte for byte the one that would be written. Frozen shards are read to their end; of all others the smallest tensors
come first, and the first that differs ends the comparison.

That says what the earlier shard had when it was written, not what the disk has now. So a shard is read back and compared when this
process takes it over for the first time, and again after a number of saves; one that is damaged is written anew.

Threads: any; several saves may run at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from shardsave._common.os_calls import CallFailed
from shardsave._common.sources import ByteSource
from shardsave._common.words import count
from shardsave._engine.transfer import TransferFault
from shardsave._format.crc64 import crc64
from shardsave._format.header import Header, with_sums
from shardsave._format.packing import Shard, StoredTensor
from shardsave._saving.comparison import Comparison, Stored
from shardsave._saving.contents import Contents
from shardsave._saving.frozen import FrozenMemory
from shardsave._saving.shards import PlannedShard, UnchangedShard, fault_before_writing
from shardsave._saving.watch import Watch
from shardsave._storage.earlier import EarlierCheckpoint
from shardsave._storage.transaction import Transaction
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

#: How many bytes of the smallest tensors of a shard are compared first; each later round compares eight times as many.
_FIRST_BYTES = 1 << 20

#: For how many files it is remembered how often they were taken over.
_MOST_REMEMBERED = 100_000

#: File (`file_identity`) → how many saves have taken it over since it was last read back.
_taken: OrderedDict[tuple[int, ...], int] = OrderedDict()


class Reuse(NamedTuple):
    """How a save takes over shards. ``directory``: of the earlier checkpoint; None: the one that is replaced. ``recheck_every``: after
    how many saves a shard is read back again. ``frozen``: name on disk → the memory of a parameter that may be assumed to be unchanged."""

    directory: str | None = None
    recheck_every: int = 10
    frozen: Mapping[str, FrozenMemory] = {}


class Unchanged(NamedTuple):
    """The shards of ``earlier`` that need not be written, and notes for the report."""

    earlier: EarlierCheckpoint | None = None
    shards: Sequence[UnchangedShard] = ()
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        if self.earlier is not None:
            self.earlier.close()


def find_unchanged(
    transaction: Transaction, contents: Contents, reuse: Reuse, comparison: Comparison, watch: Watch
) -> Unchanged:
    """Compares ``contents`` with the earlier checkpoint, which stays open. Raises what ``watch`` raises, and what `Transaction` raises."""
    earlier = transaction.earlier(reuse.directory)
    if isinstance(earlier, str):
        notes = (f"no shard of {reuse.directory} was taken over: {earlier}",) if reuse.directory is not None else ()
        return Unchanged(notes=notes)
    damage: list[str] = []
    try:
        frozen = frozenset(entry.name for entry in contents.state.entries if entry.frozen)
        candidates = list(_candidates(earlier, contents, frozen if watch.beside_training else None, damage))
        try:
            unchanged = _unchanged(candidates, frozen, comparison)
        except TransferFault as fault:
            raise fault_before_writing(transaction, fault) from fault
        watch.check()  # what was compared beside a training must be of the moment of the call
        return Unchanged(earlier, list(_with_equal_headers(unchanged, contents)), tuple(damage))
    except BaseException:
        earlier.close()
        raise


def take_over(
    transaction: Transaction,
    unchanged: Unchanged,
    shards: Mapping[str, PlannedShard],
    recheck_every: int,
    comparison: Comparison,
    watch: Watch,
) -> tuple[dict[str, UnchangedShard], list[str]]:
    """Stages those of ``shards`` (name → shard) that are unchanged, and intact on the disk.

    Returns those that need not be written any more, by name, and notes on those that are written all the same.
    """
    taken: dict[str, UnchangedShard] = {}
    notes: list[str] = []
    if unchanged.earlier is None:
        return taken, notes
    by_plan = {id(shard.planned): shard for shard in unchanged.shards}
    staged: list[tuple[str, UnchangedShard, tuple[int, ...]]] = []
    refused = gone = 0
    for name, planned in shards.items():
        watch.check()
        shard = by_plan.get(id(planned))
        if shard is None:
            continue
        identity = transaction.take_over(name, unchanged.earlier, shard.earlier)
        if identity is not None:
            staged.append((name, shard, identity))
        elif unchanged.earlier.has(shard.earlier):
            refused += 1
        else:
            gone += 1
    # Only now: where nothing can be taken over, nothing is read in vain.
    damaged = _damaged(unchanged.earlier, [shard for _, shard, _ in staged], recheck_every, comparison)
    for name, shard, identity in staged:
        if damage := damaged.get(shard.earlier.identity):
            notes.append(damage)
            transaction.drop(name)
            continue
        taken[name] = shard
        _taken[identity] = _taken.get(shard.earlier.identity, 0) + 1
        _taken.move_to_end(identity)
    while len(_taken) > _MOST_REMEMBERED:
        _taken.popitem(last=False)
    for shard in taken.values():
        watch.end_reading(shard.planned.pieces, shard.sums)
    if gone:
        notes.append(
            f"{count(gone, 'unchanged shard')} of {unchanged.earlier.path} written again: {'it was' if gone == 1 else 'they were'} removed "
            f"or replaced meanwhile"
        )
    if refused:
        notes.append(
            f"{count(refused, 'unchanged shard')} of {unchanged.earlier.path} written again: a clone or a link of a file with the owner "
            f"and the permissions of a new one was expected, it is not possible"
        )
    return taken, notes


def _damaged(
    earlier: EarlierCheckpoint, shards: Sequence[UnchangedShard], every: int, comparison: Comparison
) -> dict[tuple[int, ...], str]:
    """Those of ``shards`` that are damaged on disk, as far as this must be known now: the identity of the file, and what is damaged."""
    to_read = [shard for shard in shards if _taken.get(shard.earlier.identity, every) >= every]
    damaged = {}
    for shard, damage in zip(to_read, comparison.damage_on_disk(earlier, to_read)):
        if damage:
            damaged[shard.earlier.identity] = damage
        else:
            _taken[shard.earlier.identity] = 0
    return damaged


def _candidates(
    earlier: EarlierCheckpoint, contents: Contents, only: frozenset[str] | None, damage: list[str]
) -> Iterator[UnchangedShard]:
    """The shards of ``earlier`` whose tensors all have the same dtype and shape now. Their headers are not encoded yet.

    ``only``: the names that a shard may hold; None: all. ``damage``: gets a note on each shard that is not as its index says.
    """
    stored = {
        tensor.name: (tensor, piece) for shard in contents.shards for tensor, piece in zip(shard.layout.tensors, shard.pieces)
    }
    single = frozenset(contents.shards[0].names) if contents.single_file is not None else frozenset()
    for shard, names in earlier.held.items():
        if not names or not stored.keys() >= {*names} or (only is not None and not only.issuperset(names)):
            continue
        is_single = not single.isdisjoint(names)
        if is_single and single != {*names}:
            continue
        length = sum(stored[name][0].nbytes for name in names)
        if length > contents.max_shard_size and len(names) > 1 and not is_single:
            continue  # the caller has chosen smaller shards
        try:
            found = earlier.read(shard)
        except (CorruptCheckpointError, IncompatibleCheckpointError, CallFailed) as error:
            if earlier.is_gone():
                damage.append(f"{shard} of {earlier.path} was written anew: that checkpoint was removed or replaced meanwhile")
                continue
            damage.append(f"{error.words if isinstance(error, CallFailed) else error}; {shard} was written anew")
            continue
        if found is None or found.header.sums is None or {*found.header.tensors.names} != {*names}:
            continue
        planned = _as_it_is(found.header, stored)
        if planned is not None:
            yield UnchangedShard(planned, found.header.sums, found)


def _as_it_is(header: Header, stored: Mapping[str, tuple[StoredTensor, ByteSource]]) -> PlannedShard | None:
    """The shard with this ``header``, from the tensors of today; None if one of them has another dtype or shape now."""
    tensors, pieces = [], []
    for name, dtype, shape, nbytes in zip(*header.tensors[:3], header.tensors.nbytes):
        tensor, piece = stored[name]
        if (tensor.dtype, tuple(tensor.shape), tensor.nbytes) != (dtype, tuple(shape), nbytes):
            return None
        tensors.append(tensor)
        pieces.append(piece)
    layout = Shard(tuple(tensors), tuple(header.tensors.begins), sum(header.tensors.nbytes))
    return PlannedShard(layout, pieces)


def _with_equal_headers(shards: Iterable[UnchangedShard], contents: Contents) -> Iterator[UnchangedShard]:
    """Those of ``shards`` whose files are byte for byte the ones that would be written, with their headers."""
    for shard in shards:
        planned = _with_metadata(shard.planned, contents)
        header, record = with_sums(planned.header, shard.sums), shard.earlier.record
        if (len(header), crc64(header)) == (record.header_length, record.header_crc):
            yield shard._replace(planned=planned)


def kept_shards(contents: Contents, numbers: Sequence[Sequence[int]]) -> list[PlannedShard]:
    """The shards that another process keeps, with the sources of this one. ``numbers``: for each, those of its tensors in `contents`."""
    if not numbers:
        return []
    stored = [pair for shard in contents.shards for pair in zip(shard.layout.tensors, shard.pieces)]
    kept = []
    for of_shard in numbers:
        tensors, pieces = zip(*(stored[number] for number in of_shard))
        *begins, data_bytes = accumulate((tensor.nbytes for tensor in tensors), initial=0)
        kept.append(_with_metadata(PlannedShard(Shard(tensors, tuple(begins), data_bytes), list(pieces)), contents))
    return kept


def numbers_of(contents: Contents, shards: Sequence[PlannedShard]) -> list[list[int]]:
    """The numbers of the tensors of ``shards`` in ``contents``, as `kept_shards` needs them."""
    if not shards:
        return []
    names = (tensor.name for shard in contents.shards for tensor in shard.layout.tensors)
    place = {name: number for number, name in enumerate(names)}
    return [[place[name] for name in shard.names] for shard in shards]


def _with_metadata(shard: PlannedShard, contents: Contents) -> PlannedShard:
    """A shard of an earlier checkpoint, with the metadata that its header must have now."""
    is_single = contents.single_file is not None and not frozenset(contents.shards[0].names).isdisjoint(shard.names)
    return replace(shard, more=None if is_single else contents.state.file_metadata)


def _unchanged(candidates: Iterable[UnchangedShard], frozen: frozenset[str], comparison: Comparison) -> list[UnchangedShard]:
    """Those of ``candidates`` all of whose tensors have their stored checksums now. Raises TransferFault."""
    left: list[tuple[UnchangedShard, list[Stored]]] = []
    for shard in candidates:
        rows = list(map(Stored, shard.sums, shard.planned.layout.tensors, shard.planned.pieces))
        rows.sort(key=lambda row: row.tensor.nbytes)
        known = [comparison.known(row) for row in rows]
        if all(found in (None, row.checksum) for found, row in zip(known, rows)):
            left.append((shard, [row for found, row in zip(known, rows) if found is None]))
    bound = _FIRST_BYTES
    while any(rows for _, rows in left):
        batch: list[list[Stored]] = []
        for shard, rows in left:
            is_frozen = frozen.issuperset(shard.planned.names)
            taken, length = 0, 0
            while taken < len(rows) and (is_frozen or not taken or length + rows[taken].tensor.nbytes <= bound):
                length += rows[taken].tensor.nbytes
                taken += 1
            batch.append(rows[:taken])
            del rows[:taken]
        left = [one for one, equal in zip(left, comparison.equal(batch)) if equal]
        bound *= 8
    return [shard for shard, _ in left]
