"""What the ranks of a load need: each describes the stored tensors that it fills; together they know who needs which elements of each.

A digest of the description travels first. Where all are equal, as with FSDP, nothing else does. Ranks that fill the same stored tensors
with other meshes only tell their layouts, of which there are few.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from shardsave._common.derived_layouts import Region, Viewed
from shardsave._common.gc_pause import gc_paused
from shardsave._common.layouts import Grid, Layout, Listed, Placed, Split, Whole

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

#: Where a stored tensor begins: file and offset.
Key = tuple[str, int]

#: A layout, and the ranks that have described it. Another rank may have another one for the same tensor.
_Described = tuple[Layout, Sequence[int]]


class ReadRequest(NamedTuple):
    """A stored tensor that somebody needs: its dtype as in safetensors, and who needs what."""

    dtype: str
    layout: Layout


class _Description(NamedTuple):
    """``layouts``: the distinct ones, in the order of their first use. ``rows``: files and, for each wanted tensor, the number of its
    file, its offset, its dtype, and the number of its layout."""

    layouts: bytes
    rows: bytes


def agree_on_requests(session: Session, mine: Mapping[Key, ReadRequest]) -> dict[Key, ReadRequest]:
    """What all ranks want, in the order of files and offsets; equal on all ranks.

    A `Whole` layout among ``mine`` says that this rank wants all of a tensor; the ranks in it are not looked at.
    """
    with gc_paused():
        mine = dict(sorted(mine.items()))
        description = _describe(mine)
    digests = session.gather("what ranks need", b"".join(hashlib.sha256(part).digest() for part in description))
    groups: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(digests or ()):
        groups.setdefault(digest, []).append(rank)
    by_rows: dict[bytes, list[list[int]]] = {}  # ranks with the same rows, in groups that also have the same layouts
    for digest, ranks in groups.items():
        by_rows.setdefault(digest[32:], []).append(ranks)
    classes = _published(session, [*by_rows.values()])
    if len(classes) == 1 and len(classes[0]) == 1:
        with gc_paused():
            return _with_ranks(mine, tuple(classes[0][0]))
    return _joined(session, description, classes)


def _published(session: Session, classes: list[list[list[int]]]) -> list[list[list[int]]]:
    data = session.publish("who needs the same", json.dumps(classes).encode() if session.leads else None)
    return json.loads(data)  # type: ignore[no-any-return]


def _with_ranks(wants: Mapping[Key, ReadRequest], ranks: tuple[int, ...]) -> dict[Key, ReadRequest]:
    """``wants`` of all of ``ranks``, which want the same: whole tensors are wanted by each of them."""
    if not any(isinstance(want.layout, (Whole, Viewed)) for want in wants.values()):
        return dict(wants)
    return {key: want._replace(layout=_of_ranks(want.layout, ranks)) for key, want in wants.items()}


def _of_ranks(layout: Layout, ranks: tuple[int, ...]) -> Layout:
    if isinstance(layout, Whole):
        return Whole(ranks, layout.shape)
    if isinstance(layout, Viewed):
        return Viewed(_of_ranks(layout.whole, ranks), layout.region)
    return layout


def _joined(session: Session, description: _Description, classes: Sequence[Sequence[Sequence[int]]]) -> dict[Key, ReadRequest]:
    """The wants of ``classes`` of ranks. One rank of each tells what the others of it need too."""
    tells_rows = session.rank in {groups[0][0] for groups in classes} and len(classes) > 1
    tells_layouts = session.rank in {group[0] for groups in classes for group in groups}
    mine = [description.layouts.decode() if tells_layouts else "", description.rows.decode() if tells_rows else ""]
    told = [json.loads(data) for data in session.exchange("what each rank needs", json.dumps(mine).encode())]
    found: dict[Key, list[_Described]] = {}
    dtypes: dict[Key, str] = {}
    for groups in classes:
        everybody = tuple(sorted(rank for group in groups for rank in group))
        tables = [(_decode_all(told[group[0]][0], tuple(group)), group) for group in groups]
        layouts = [_union([(table[n], group) for table, group in tables]) for n in range(len(tables[0][0]))]
        shards, rows = json.loads(told[groups[0][0]][1] or description.rows)
        for shard, offset, dtype, number in rows:
            key = shards[shard], offset
            found.setdefault(key, []).append((layouts[number], everybody))
            dtypes[key] = dtype
    return {key: ReadRequest(dtypes[key], _union(found[key])) for key in sorted(found)}


def _union(described: Sequence[_Described]) -> Layout:
    first = described[0][0]
    if len(described) == 1 or all(layout == first for layout, _ in described):
        return first
    if all(isinstance(layout, Whole) for layout, _ in described):
        return Whole(tuple(sorted(rank for _, ranks in described for rank in ranks)), first.shape)
    return Listed({rank: layout.boxes(rank) for layout, ranks in described for rank in ranks}, first.shape)


def _describe(wants: Mapping[Key, ReadRequest]) -> _Description:
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
    return _Description(_json([_encode(layout) for layout in layouts]), _json([shards, rows]))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _encode(layout: Layout) -> list[Any]:
    if isinstance(layout, Whole):
        return ["whole", layout.shape]
    if isinstance(layout, Placed):
        return ["placed", layout.shape, layout.grid.ranks, layout.grid.sizes, layout.splits]
    if isinstance(layout, Viewed):
        return ["viewed", layout.region, _encode(layout.whole)]
    return ["listed", layout.shape, [(rank, layout.boxes(rank)) for rank in layout.ranks]]


def _decode_all(layouts: str, ranks: tuple[int, ...]) -> list[Layout]:
    """The layouts that ``ranks`` have described."""
    return [_of_ranks(_decode(*layout), ranks) for layout in json.loads(layouts)]


def _decode(kind: str, *values: Any) -> Layout:
    if kind == "whole":
        return Whole((), tuple(values[0]))
    if kind == "placed":
        shape, ranks, sizes, splits = values
        return Placed(Grid(ranks, sizes), [Split(*split) for split in splits], shape)
    if kind == "viewed":
        region, whole = values
        return Viewed(_decode(*whole), Region(*map(tuple, region)))
    shape, by_rank = values
    return Listed({rank: [(tuple(begin), tuple(sizes)) for begin, sizes in boxes] for rank, boxes in by_rank}, shape)
