"""What the ranks of a load need: each describes the stored tensors that it fills; together they know who needs which elements of each.

A digest of the description travels first. Where all are equal, as with FSDP, nothing else does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from shardsave._common.layouts import Grid, Layout, Listed, Placed, Split, Whole
from shardsave._common.windows import Window

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

#: Where a stored tensor begins: file and offset.
Key = tuple[str, int]


class Want(NamedTuple):
    """A stored tensor that somebody needs: its dtype as in safetensors, and who needs what."""

    dtype: str
    layout: Layout


def agree_on_wants(session: Session, mine: Mapping[Key, Want]) -> dict[Key, Want]:
    """What all ranks want, in the order of files and offsets; equal on all ranks.

    A `Whole` layout among ``mine`` says that this rank wants all of a tensor; the ranks in it are not looked at.
    """
    mine = dict(sorted(mine.items()))
    description = _describe(mine)
    digests = session.gather("what ranks need", hashlib.sha256(description).digest())
    classes: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(digests or ()):
        classes.setdefault(digest, []).append(rank)
    groups: list[list[int]] = json.loads(
        session.publish("who needs the same", json.dumps([*classes.values()]).encode() if session.leads else None)
    )
    if len(groups) == 1:
        return _with_ranks(mine, groups[0])
    firsts = {group[0] for group in groups}
    described = session.exchange("what each rank needs", description if session.rank in firsts else b"")
    return _joined([(_with_ranks(_parse(described[group[0]]), group), group) for group in groups])


def _with_ranks(wants: Mapping[Key, Want], ranks: Sequence[int]) -> dict[Key, Want]:
    """``wants`` of all of ``ranks``, which want the same: whole tensors are wanted by each of them."""
    everybody = tuple(ranks)
    if not any(isinstance(want.layout, (Whole, Window)) for want in wants.values()):
        return dict(wants)
    return {key: want._replace(layout=_of_ranks(want.layout, everybody)) for key, want in wants.items()}


def _of_ranks(layout: Layout, ranks: tuple[int, ...]) -> Layout:
    if isinstance(layout, Whole):
        return Whole(ranks, layout.shape)
    if isinstance(layout, Window):
        return Window(_of_ranks(layout.layout, ranks), layout.begin, layout.sizes, layout.dims)
    return layout


def _joined(parts: Sequence[tuple[Mapping[Key, Want], Sequence[int]]]) -> dict[Key, Want]:
    layouts: dict[Key, list[tuple[Layout, Sequence[int]]]] = {}
    dtypes: dict[Key, str] = {}
    for wants, ranks in parts:
        for key, want in wants.items():
            layouts.setdefault(key, []).append((want.layout, ranks))
            dtypes[key] = want.dtype
    return {key: Want(dtypes[key], _union(layouts[key])) for key in sorted(layouts)}


def _union(layouts: Sequence[tuple[Layout, Sequence[int]]]) -> Layout:
    first = layouts[0][0]
    if all(isinstance(layout, Whole) for layout, _ in layouts):
        return Whole(tuple(sorted(rank for _, ranks in layouts for rank in ranks)), first.shape)
    return Listed({rank: layout.boxes(rank) for layout, ranks in layouts for rank in ranks}, first.shape)


def _describe(wants: Mapping[Key, Want]) -> bytes:
    shards = sorted({shard for shard, _ in wants})
    shard_numbers = {shard: number for number, shard in enumerate(shards)}
    layouts: dict[Layout, int] = {}
    by_object: dict[int, int] = {}  # layouts are compared slowly, and most tensors share theirs
    rows = []
    for (shard, offset), (dtype, layout) in wants.items():
        number = by_object.get(id(layout))
        if number is None:
            plain = layout._replace(ranks=()) if isinstance(layout, Whole) else layout
            number = by_object[id(layout)] = layouts.setdefault(plain, len(layouts))
        rows.append((shard_numbers[shard], offset, dtype, number))
    return json.dumps([shards, [_encode(layout) for layout in layouts], rows], separators=(",", ":")).encode()


def _parse(description: bytes) -> dict[Key, Want]:
    shards, encoded, rows = json.loads(description)
    layouts = [_decode(*layout) for layout in encoded]
    return {(shards[shard], offset): Want(dtype, layouts[number]) for shard, offset, dtype, number in rows}


def _encode(layout: Layout) -> list[Any]:
    if isinstance(layout, Whole):
        return ["whole", layout.shape]
    if isinstance(layout, Placed):
        return ["placed", layout.shape, layout.grid.ranks, layout.grid.sizes, layout.splits]
    if isinstance(layout, Window):
        return ["window", layout.begin, layout.sizes, layout.dims, _encode(layout.layout)]
    return ["listed", layout.shape, [(rank, layout.boxes(rank)) for rank in layout.ranks]]


def _decode(kind: str, *values: Any) -> Layout:
    if kind == "whole":
        return Whole((), tuple(values[0]))
    if kind == "placed":
        shape, ranks, sizes, splits = values
        return Placed(Grid(ranks, sizes), [Split(*split) for split in splits], shape)
    if kind == "window":
        begin, sizes, dims, layout = values
        return Window(_decode(*layout), begin, sizes, dims)
    shape, by_rank = values
    return Listed({rank: [(tuple(begin), tuple(sizes)) for begin, sizes in boxes] for rank, boxes in by_rank}, shape)
