"""Compares the tensors of a job with the checksums of an earlier checkpoint: each rank sums what it has, and the parts are joined.

Rank 0 knows the checksums and asks; the others answer. Of each shard, a rank tells one number: the sum of what its boxes add to the raw
checksums of the tensors, each multiplied by a factor of its own. Nothing else is exchanged. Where rank 0 asks what the disk has of them,
`reading_back` answers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._common.gc_pause import gc_paused
from shardsave._common.layouts import Extent, Layout, Shared, without
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._format.crc64 import raw_sums_of
from shardsave._format.packing import StoredTensor
from shardsave._ranks.box_sums import Runs, Summand, box_sums, runs_of
from shardsave._ranks.communicator import Communicator
from shardsave._ranks.joined_sums import factors, times
from shardsave._ranks.reading_back import Question, read_together
from shardsave._ranks.replicas import shared, view_of
from shardsave._saving.comparison import Stored
from shardsave._saving.contents import Contents
from shardsave._saving.frozen import FrozenMemory, remember, sum_when_saved
from shardsave._saving.read_back import damage_of, damage_on_disk
from shardsave._saving.shards import UnchangedShard
from shardsave._saving.watch import Watch
from shardsave._storage.earlier import EarlierCheckpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Sums = NDArray[np.uint64]


#: What a question of rank 0 begins with: which tensors to compare, or which files to read back.
_COMPARE, _READ_BACK = b"c", b"r"


class AmongRanks:
    """The comparison of all ranks of ``session``, which make it from equal ``contents``. ``frozen``: name → memory of this rank that may be
    assumed to be unchanged. ``ask``: tells the other ranks, which call `answer` with what they were told. ``known``: as in
    `replicas.Checked`.
    """

    def __init__(
        self,
        session: Communicator,
        contents: Contents,
        frozen: Mapping[str, FrozenMemory],
        watch: Watch,
        ask: Callable[[bytes], object],
        known: Callable[[], Mapping[tuple[int, Extent], int]],
    ) -> None:
        self._session = session
        self._contents = contents
        self._frozen = frozen
        self._watch = watch
        self._ask = ask
        self._find_known = known
        self._sums: dict[str, int] = {}  # name in ``frozen`` → what this rank adds

    @cached_property
    def _stored(self) -> Sequence[tuple[StoredTensor, ByteSource]]:
        """All tensors in the order of the files. Most saves compare nothing."""
        with gc_paused():
            return [pair for shard in self._contents.shards for pair in zip(shard.layout.tensors, shard.pieces)]

    @cached_property
    def _known(self) -> Mapping[tuple[int, Extent], int]:
        return self._find_known()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """Name of a tensor → its number."""
        return {tensor.name: number for number, (tensor, _) in enumerate(self._stored)}

    def known(self, stored: Stored) -> int | None:
        """None: no rank knows the checksum of a whole tensor."""
        return None

    def equal(self, lists: Sequence[Sequence[Stored]]) -> list[bool]:
        """As `Comparison.equal`. Called on rank 0 alone."""
        numbers = [[self._numbers[stored.tensor.name] for stored in row] for row in lists]
        self._ask(_COMPARE + zlib.compress(json.dumps(numbers).encode(), 1))
        found = self._gathered(numbers)
        assert found is not None
        rows = [stored for row in lists for stored in row]
        checksums = np.array([stored.checksum for stored in rows], np.uint64)
        wanted = _combined(numbers, raw_sums_of(checksums, np.array([stored.tensor.nbytes for stored in rows], np.int64)))
        return (found == wanted).tolist()  # type: ignore[no-any-return]

    def damage_on_disk(self, earlier: EarlierCheckpoint, shards: Sequence[UnchangedShard]) -> list[str]:
        """As `Comparison.damage_on_disk`. Called on rank 0 alone."""
        if not shards:
            return []
        question = Question.about(earlier, shards, self._numbers)
        self._ask(_READ_BACK + question.encode())
        read = self._read_back(question)
        assert read is not None
        return [
            damage_of(earlier, shard, sums) if sums is not None else damage_on_disk(earlier, shard, self._watch.check)
            for shard, sums in zip(shards, read)
        ]

    def answer(self, question: bytes) -> None:
        """Tells rank 0 what this rank has of the tensors that it asks for, or what the disk has of them. Raises as `Comparison.equal`."""
        if question.startswith(_READ_BACK):
            self._read_back(Question.decode(question[len(_READ_BACK) :]))
        else:
            self._gathered(json.loads(zlib.decompress(question[len(_COMPARE) :])))

    def _read_back(self, question: Question) -> list[list[int] | None] | None:
        return read_together(self._session, question, lambda number: self._stored[number][0], self._watch.check)

    def remember(self) -> None:
        """Notes what the frozen parameters had, once it is saved."""
        remember(self._frozen, self._sums)

    def _gathered(self, numbers: Sequence[Sequence[int]]) -> Sums | None:
        """One number for each shard, joined from all ranks; ``numbers``: of its tensors. None where this rank does not lead."""
        mine = _combined(numbers, self._sums_of([number for row in numbers for number in row]))
        gathered = self._session.gather("sums of shards", mine.astype("<u8").tobytes())
        if gathered is None:
            return None
        joined: Sums = np.bitwise_xor.reduce([np.frombuffer(one, "<u8").astype(np.uint64) for one in gathered], axis=0)
        return joined

    def _sums_of(self, numbers: Sequence[int]) -> Sums:
        """What this rank adds to the raw sum of each tensor."""
        total = np.zeros(len(numbers), np.uint64)
        parts: list[Summand] = []
        places: list[int] = []
        assumed: dict[str, int] = {}  # name → the place of a sum that may be remembered
        with gc_paused():
            for place, number in enumerate(numbers):
                tensor, piece = self._stored[number]
                given = self._given(number, piece)
                memory = self._frozen.get(tensor.name)
                if memory is not None and not self._is_alone_in(piece, given):
                    memory = None
                if memory is not None:
                    known = sum_when_saved(memory)
                    if known is not None:
                        total[place] = self._sums[tensor.name] = known
                        continue
                    assumed[tensor.name] = place
                parts += given
                places += [place] * len(given)
        if parts:
            np.bitwise_xor.at(total, places, box_sums(parts, self._watch.workers, self._watch.check))
        self._sums.update((name, int(total[place])) for name, place in assumed.items())
        return total

    def _is_alone_in(self, piece: ByteSource, parts: Sequence[Summand]) -> bool:
        """Whether ``parts`` are all that this rank has of ``piece``, in one tensor, and no other rank has it too: a change of a replica
        that this rank was sent by a collective is not counted by torch, but where it was made it is."""
        if not isinstance(piece, Spread) or len(piece.local) != 1 or len(parts) != 1:
            return False
        source = parts[0].source
        if not isinstance(source, TensorSource) or source.tensor is not piece.local[0].tensor:
            return False
        return all(len(box.holders) == 1 for box in _boxes(piece.layout, self._session.rank, piece.dtype.itemsize))

    def _given(self, number: int, piece: ByteSource) -> list[Summand]:
        """What this rank sums of a tensor, so that of each element one rank sums it. Replicas take turns from tensor to tensor."""
        rank = self._session.rank
        if not isinstance(piece, Spread):  # rank 0 writes it
            return [Summand(piece, Runs(piece.nbytes, (), 0), getattr(piece, "crc", None))] if rank == 0 else []
        parts = []
        for holders, box, runs in _boxes(piece.layout, rank, piece.dtype.itemsize):
            if holders[number % len(holders)] == rank:
                tensor = view_of(piece.local, box)
                checksum = piece.sum_of(tensor)
                if checksum is None and tensor.dtype is piece.dtype:
                    checksum = self._known.get((id(piece), box))
                parts.append(Summand(TensorSource(tensor, piece.dtype), runs, checksum))
        return parts


class _Box(NamedTuple):
    """A box that each of ``holders`` has, and its bytes in the tensor."""

    holders: Sequence[int]
    box: Extent
    runs: Runs


@lru_cache(maxsize=4096)
def _boxes(layout: Layout, rank: int, itemsize: int) -> Sequence[_Box]:
    """What ``rank`` has of a tensor: what it alone has, and what others have too."""
    alike = shared(layout, rank)
    others = [box for _, box in alike]
    own = [Shared((rank,), part) for box in layout.boxes(rank) for part in without(box, others)]
    return [_Box(holders, box, runs_of(layout.shape, itemsize, box)) for holders, box in (*own, *alike)]


def _combined(numbers: Sequence[Sequence[int]], sums: Sums) -> Sums:
    """One number for each list of tensors, from the ``sums`` of all of them."""
    products = times(sums, factors(np.array([number for row in numbers for number in row], np.uint64)))
    total = np.zeros(len(numbers), np.uint64)
    np.bitwise_xor.at(total, np.repeat(np.arange(len(numbers)), [len(row) for row in numbers]), products)
    return total
