"""Whether replicas are equal: what several ranks hold of a tensor is summed on each of them, and the sums are compared.

A digest of all sums travels first; the sums themselves only where digests differ, and from few ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from shardsave._common.assembled import Chunk
from shardsave._common.gc_pause import gc_paused
from shardsave._common.layouts import Extent, Layout, LowestOnly, Placed, Shared, overlap
from shardsave._common.senders import holders
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._common.words import count, some
from shardsave._engine.checksums import checksums
from shardsave._ranks.communicator import Communicator
from shardsave._state.module import Entry, State
from shardsave.errors import UnsupportedTensorError

#: From so many ranks of one set of replicas the sums are compared one by one, to name the tensors that differ.
_MOST_COMPARED = 16


class _Replicated(NamedTuple):
    """A ``box`` that several ranks hold of the tensor with this ``number``."""

    number: int
    box: Extent


class ReplicaSums(NamedTuple):
    """The checksums that replicas on this rank had at one moment: set of ranks (as a key) → those of its boxes.

    ``names``, ``layouts``: of the tensors that were looked at, column by column.
    """

    names: Sequence[str]
    layouts: Sequence[Layout]
    of_sets: Mapping[bytes, np.ndarray[Any, np.dtype[np.uint64]]]


class Checked(NamedTuple):
    """A ``state`` in which replicas are equal, and ``notes`` for the report. ``known``: returns the checksums of the replicas of this rank,
    which need not be summed again: `id` of the source in ``state``, and the box → checksum."""

    state: State
    notes: tuple[str, ...]
    known: Callable[[], Mapping[tuple[int, Extent], int]]


def check_replicas(session: Communicator, state: State, on_divergence: Literal["raise", "lowest_rank"]) -> Checked:
    """Compares the replicas of ``state``, which `agree` returned.

    If replicas differ: raises UnsupportedTensorError on all ranks, or lets only the lowest rank of each have them, and says so in a note.
    """
    sums = sum_replicas(state.entries, session.rank)
    notes = compare_replicas(session, sums, on_divergence)
    if not notes:
        return Checked(state, (), partial(_known, state.entries, sums, session.rank))
    entries = tuple(entry._replace(source=_lowest(entry.source, session.rank)) for entry in state.entries)
    return Checked(state._replace(entries=entries), notes, dict)


def _known(entries: Sequence[Entry], sums: ReplicaSums, rank: int) -> dict[tuple[int, Extent], int]:
    sources = [entry.source for entry in entries if entry.tied_to is None]
    sets = _replicated(sums.layouts, rank)
    return {
        (id(sources[number]), box): checksum
        for key, pieces in sets.items()
        for (number, box), checksum in zip(pieces, sums.of_sets[key].tolist())
    }


def sum_replicas(entries: Sequence[Entry], rank: int) -> ReplicaSums:
    """The checksums of what ``rank`` has of ``entries``, and others have too. Keeps nothing of them in memory."""
    names = [entry.name for entry in entries if entry.tied_to is None]
    sources: list[Any] = [entry.source for entry in entries if entry.tied_to is None]  # of each a `Spread`
    layouts = [source.layout for source in sources]
    with gc_paused():
        sets = _replicated(layouts, rank)
        held = [sources[number] for pieces in sets.values() for number, _ in pieces]
        tensors = [view_of(sources[number].local, box) for pieces in sets.values() for number, box in pieces]
        known = [source.sum_of(tensor) if tensor.dtype is source.dtype else None for source, tensor in zip(held, tensors)]
        unknown = [number for number, checksum in enumerate(known) if checksum is None]
    sums = np.array([checksum or 0 for checksum in known], np.uint64)
    sums[unknown] = checksums([TensorSource.of(tensors[number]) for number in unknown])
    at = 0
    of_sets: dict[bytes, np.ndarray[Any, np.dtype[np.uint64]]] = {}
    for key, pieces in sets.items():
        of_sets[key] = sums[at : at + len(pieces)]
        at += len(pieces)
    return ReplicaSums(names, layouts, of_sets)


def compare_replicas(
    session: Communicator, sums: ReplicaSums, on_divergence: Literal["raise", "lowest_rank"], *, of_training: bool = False
) -> tuple[str, ...]:
    """Compares ``sums`` of all ranks. Returns a note if some differ, or raises UnsupportedTensorError on all ranks.

    ``of_training``: they are of a training state, where each rank may have something of its own.
    """
    of_sets = sums.of_sets
    mine = b"".join(key + hashlib.sha256(values.tobytes()).digest()[:16] for key, values in of_sets.items())
    digests = session.gather("sums of replicas", mine)
    differ = json.loads(session.publish("replicas that differ", _differing(digests) if digests is not None else None))
    if not differ:
        return ()
    asked = {bytes.fromhex(key): ranks for key, ranks in differ.items()}
    sent = b"".join(values.tobytes() for key, values in of_sets.items() if session.rank in asked.get(key, ()))
    parts = session.gather("sums that differ", zlib.compress(sent, 1))
    said = None
    if parts is not None:
        said = _words(session, sums, asked, [np.frombuffer(zlib.decompress(part), np.uint64) for part in parts]).encode()
    found = session.publish("tensors that differ", said).decode()
    if of_training:
        found = f"the training state's {found}"
    if on_divergence == "raise":
        own = "what each rank has for itself is marked by shardsave.PerRank; " if of_training else ""
        raise UnsupportedTensorError(
            f"cannot save {found}; {own}on_divergence='lowest_rank' saves those of the lowest rank; nothing was written"
        )
    return (f"of replicas, those of the lowest rank were saved: {found}",)


def _replicated(layouts: Sequence[Layout], rank: int) -> dict[bytes, list[_Replicated]]:
    """What ``rank`` holds and other ranks hold too: set of ranks (as a key) → the boxes in the order of ``layouts``."""
    of_layout: dict[int, list[tuple[bytes, Extent]]] = {}  # by identity: of many tensors, few have a layout of their own
    sets: dict[bytes, list[_Replicated]] = {}
    for number, layout in enumerate(layouts):
        found = of_layout.get(id(layout))
        if found is None:
            found = of_layout[id(layout)] = [(_key(tuple(alike)), box) for alike, box in shared(layout, rank)]
        for key, box in found:
            sets.setdefault(key, []).append(_Replicated(number, box))
    return sets


@lru_cache(maxsize=4096)
def shared(layout: Layout, rank: int) -> tuple[Shared, ...]:
    """The boxes that ``rank`` and other ranks hold; each is the same box on all of its holders."""
    boxes = layout.boxes(rank)
    if isinstance(layout, Placed):
        alike = layout.grid.replicas(rank, layout.splits) if boxes else ()
        return tuple(Shared(alike, box) for box in boxes) if len(alike) > 1 else ()
    holding = holders(layout)
    if holding is not None:
        return tuple(Shared(holding[box], box) for box in boxes if len(holding[box]) > 1)
    holding = {}
    for holder in layout.ranks:
        for box in layout.boxes(holder):
            holding[box] = (*holding.get(box, ()), holder)
    found = []
    for box in (cell for own in boxes for cell in _cells(own, holding)):
        alike = tuple(sorted({r for other, ranks in holding.items() if overlap(box, other) is not None for r in ranks}))
        if len(alike) > 1:
            found.append(Shared(alike, box))
    return tuple(found)


def _cells(box: Extent, others: Mapping[Extent, Any]) -> Iterator[Extent]:
    """``box``, cut wherever one of ``others`` begins or ends within it: each cell is in such a box as a whole or not at all."""
    cells = [box]
    for dim in range(len(box[0])):
        cuts = sorted({cut for begin, sizes in others for cut in (begin[dim], begin[dim] + sizes[dim])})
        cells = [part for cell in cells for part in _cut(cell, dim, cuts)]
    yield from cells


def _cut(box: Extent, dim: int, cuts: Sequence[int]) -> Iterator[Extent]:
    first, stop = box[0][dim], box[0][dim] + box[1][dim]
    inside = [first, *(cut for cut in cuts if first < cut < stop), stop]
    for low, high in itertools.pairwise(inside):
        yield (*box[0][:dim], low, *box[0][dim + 1 :]), (*box[1][:dim], high - low, *box[1][dim + 1 :])


@lru_cache(maxsize=1024)
def _key(ranks: Sequence[int]) -> bytes:
    return hashlib.sha256(np.array(ranks, np.int64).tobytes()).digest()[:16]


def view_of(chunks: Sequence[Chunk], box: Extent) -> torch.Tensor:
    """The elements of ``box``, which is within one of ``chunks``."""
    if len(chunks) == 1 and box == (chunks[0].begin, chunks[0].tensor.shape):
        return chunks[0].tensor
    begin, tensor = next(chunk for chunk in chunks if overlap((chunk.begin, tuple(chunk.tensor.shape)), box) is not None)
    if tuple(tensor.shape) == box[1]:
        return tensor
    return tensor[tuple(slice(at - first, at - first + size) for at, first, size in zip(box[0], begin, box[1]))]


def _differing(messages: Sequence[bytes]) -> bytes:
    """The sets of ranks whose digests differ, each with the ranks that are to send their sums: the lowest, and some that differ from it."""
    by_set: dict[bytes, list[tuple[int, bytes]]] = {}
    for rank, message in enumerate(messages):
        for at in range(0, len(message), 32):
            by_set.setdefault(message[at : at + 16], []).append((rank, message[at + 16 : at + 32]))
    differ = {}
    for key, said in by_set.items():
        (lowest, first), *_ = said
        others = [rank for rank, other in said if other != first]
        if others:
            differ[key.hex()] = [lowest, *others[: _MOST_COMPARED - 1]]
    return json.dumps(differ).encode()


def _words(session: Communicator, summed: ReplicaSums, asked: Mapping[bytes, Sequence[int]], parts: Sequence[Any]) -> str:
    """Which tensors differ on which ranks. ``parts``: the sums that each rank sent, in the order of its own sets."""
    differ: dict[int, dict[int, set[int]]] = {}  # number of a tensor → lowest rank → others
    replicated = {rank: _replicated(summed.layouts, rank) for ranks in asked.values() for rank in ranks}
    sums: dict[tuple[bytes, int], Any] = {}
    for rank, sets in replicated.items():
        sent = [key for key in sets if rank in asked.get(key, ())]
        ends = np.cumsum([len(sets[key]) for key in sent])
        sums.update({(key, rank): values for key, values in zip(sent, np.split(parts[rank], ends[:-1]))})
    for key, (lowest, *others) in asked.items():
        for rank in others:
            for place in np.flatnonzero(sums[key, rank] != sums[key, lowest]).tolist():
                differ.setdefault(replicated[lowest][key][place].number, {}).setdefault(lowest, set()).add(rank)
    first = min(differ)
    lowest = min(differ[first])
    ranks = some(map(session.name, sorted(differ[first][lowest])))
    more = f" and {count(len(differ) - 1, 'other tensor')}" if len(differ) > 1 else ""
    return (
        f"{summed.names[first]!r}{more}: the same values on all ranks that hold them were expected, {ranks} and "
        f"{session.name(lowest)} differ"
    )


@lru_cache(maxsize=4096)
def _lowest_only(layout: Layout) -> LowestOnly:
    return LowestOnly(layout)


def _lowest(source: Any, rank: int) -> Spread:
    layout = _lowest_only(source.layout)
    return Spread(source.dtype, layout, [Chunk(box[0], view_of(source.local, box)) for box in layout.boxes(rank)])
