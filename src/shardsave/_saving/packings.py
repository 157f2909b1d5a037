"""Packs the entries of a save into shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from shardsave._common.spread import kinds_of
from shardsave._format.dtypes import BY_TORCH, logical_shape
from shardsave._format.packing import StoredTensor, pack
from shardsave._saving.shards import PlannedShard
from shardsave._state.module import Entry


class _Question(NamedTuple):
    """All that decides how tensors are packed. ``kinds``: of each, the number of its dtype, shape and bytes in ``table``; ``frozen``:
    whether it is packed with those that are frozen. ``bound``, ``more``: as for `plan_shards`."""

    names: Sequence[str]
    kinds: Sequence[int]
    frozen: Sequence[bool]
    table: Sequence[tuple[torch.dtype, tuple[int, ...], int]]
    bound: int | None
    more: Mapping[str, str] | None


class _Packed(NamedTuple):
    """A shard without the memory of its tensors, and the positions of these among all that were packed, in file order."""

    shard: PlannedShard
    order: Sequence[int]


class Packings:
    """Remembers how tensors were packed last. The saves of a training mostly pack the same ones, and very many take long.

    Nothing is assumed to be the same: all that decides about the packing is compared. No tensor is kept. Any thread may use it.
    """

    def __init__(self) -> None:
        self._last: tuple[_Question, Sequence[_Packed]] | None = None

    def packed(self, question: _Question) -> Sequence[_Packed]:
        last = self._last
        if last is None or last[0] != question:
            last = self._last = question, _packed(question)
        return last[1]


def plan_shards(
    entries: Sequence[Entry],
    bound: int | None,
    *,
    apart: bool = True,
    more: Mapping[str, str] | None = None,
    packings: Packings | None = None,
) -> list[PlannedShard]:
    """Packs ``entries`` into shards of at most ``bound`` bytes of data, or into one shard if it is None.

    ``apart``: no shard holds both frozen and trainable entries. ``more``: additional items of the headers' ``__metadata__``.
    ``packings``: remembers the result. Raises ValueError for a header that is too long.
    """
    sources = [entry.source for entry in entries]
    kinds, first = kinds_of(sources)
    question = _Question(
        [entry.name for entry in entries],
        kinds,
        [apart and bool(entry.frozen) for entry in entries],
        [(source.dtype, source.shape, source.nbytes) for source in first],
        bound,
        more,
    )
    packed = _packed(question) if packings is None else packings.packed(question)
    shards = [shard.with_pieces([sources[position] for position in order]) for shard, order in packed]
    if bound is None or more:  # else `pack` has kept all headers short
        for shard in shards:
            _ = shard.header
    return shards


def _packed(question: _Question) -> Sequence[_Packed]:
    kinds = [(BY_TORCH[dtype].name, logical_shape(dtype, shape), nbytes) for dtype, shape, nbytes in question.table]
    rows = ((name, *kinds[kind], frozen) for name, kind, frozen in zip(question.names, question.kinds, question.frozen))
    layouts = pack([*map(StoredTensor._make, rows)], question.bound)
    place = {name: position for position, name in enumerate(question.names)}
    return [
        _Packed(PlannedShard(layout, [], question.more), [place[tensor.name] for tensor in layout.tensors])
        for layout in layouts
    ]


def repack(
    shards: Sequence[PlannedShard],
    kept: Sequence[PlannedShard],
    bound: int,
    place: Callable[[str], int],
    more: Mapping[str, str] | None,
) -> list[PlannedShard]:
    """The shards ``kept``, and the tensors of ``shards`` that they do not hold, packed again in the order of ``place`` in the state."""
    stored = [pair for shard in shards for pair in zip(shard.layout.tensors, shard.pieces)]
    stored.sort(key=lambda pair: place(pair[0].name))
    pieces = {tensor.name: piece for tensor, piece in stored}
    layouts = pack([tensor for tensor, _ in stored], bound, [shard.layout for shard in kept])
    new = [PlannedShard(layout, [pieces[tensor.name] for tensor in layout.tensors], more) for layout in layouts[len(kept) :]]
    return [*kept, *new]
