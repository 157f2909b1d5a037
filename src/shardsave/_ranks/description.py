"""What one rank says of its state, as bytes: equal on two ranks if they have the same tensors, placed in the same way.

The meshes are not part of these bytes: a mesh that covers a part of the ranks is another one on each of its parts.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from shardsave._common.layouts import Extent, Grid, Layout, Listed, Placed, Split, Whole
from shardsave._common.sources import ByteSource
from shardsave._common.spread import Spread, kinds_of
from shardsave._state.module import State

#: (kind of an entry, its freeze flag) → one letter.
_LETTERS = {("parameter", True): "f", ("parameter", False): "t", ("buffer", None): "b", ("tensor", None): "x"}
KINDS = {letter: kind for kind, letter in _LETTERS.items()}


class Form(NamedTuple):
    """What many tensors have in common. ``mesh``: the number of the mesh on which they are placed, -1 if they are not.

    ``splits``: how they are placed there. ``boxes``: the boxes that this rank lists; None if it holds the whole, or is on a mesh.
    """

    dtype: str
    shape: tuple[int, ...]
    mesh: int = -1
    splits: tuple[Split, ...] = ()
    boxes: tuple[Extent, ...] | None = None

    def layout(self, grids: Sequence[Grid], ranks: Sequence[int]) -> Layout:
        """The layout of such a tensor on ``ranks``, all of which say this of it."""
        if self.mesh >= 0:
            return Placed(grids[self.mesh], self.splits, self.shape)
        if self.boxes is not None:
            return Listed(dict.fromkeys(ranks, self.boxes), self.shape)
        return Whole(tuple(ranks), tuple(self.shape))


class Description(NamedTuple):
    """The entries of a state, column by column. ``letters``, ``forms``: of each name, its kind and the number of its form in ``table``.

    ``ties``: pairs of positions, the later name first. The rest is that of `State`.
    """

    names: Sequence[str]
    letters: str
    forms: Sequence[int]
    table: Sequence[Form]
    ties: Sequence[tuple[int, int]]
    flags_known: bool
    overlaps: Sequence[tuple[str, str]]
    files: dict[str, str]
    notes: Sequence[str]
    file_metadata: dict[str, str]

    def encoded(self) -> bytes:
        return json.dumps(self, separators=(",", ":")).encode()


def describe(state: State) -> tuple[Description, list[Grid]]:
    """The description of ``state``, and the meshes whose numbers are in it."""
    entries = state.entries
    names = [entry.name for entry in entries]
    forms, table, grids = _forms([entry.source for entry in entries])
    tied = [(position, entry.tied_to) for position, entry in enumerate(entries) if entry.tied_to is not None]
    positions = {name: position for position, name in enumerate(names)} if tied else {}
    description = Description(
        names,
        "".join([_LETTERS[pair] for pair in map(itemgetter(1, 2), entries)]),
        forms,
        table,
        [(position, positions[first]) for position, first in tied],
        state.flags_known,
        state.overlaps,
        dict(state.files),
        state.notes,
        dict(state.file_metadata),
    )
    return description, grids


def _forms(sources: Sequence[ByteSource]) -> tuple[list[int], list[Form], list[Grid]]:
    """For each source the number of its form, these forms, and the meshes in them."""
    kinds, first = kinds_of(sources)
    grids: dict[Grid, int] = {}
    numbers: dict[Form, int] = {}
    of_kind = [numbers.setdefault(_form(source, grids), len(numbers)) for source in first]
    return [of_kind[kind] for kind in kinds], list(numbers), list(grids)


def _form(source: ByteSource, grids: dict[Grid, int]) -> Form:
    dtype, shape = str(source.dtype).removeprefix("torch."), tuple(source.shape)
    layout = source.layout if isinstance(source, Spread) else None
    if isinstance(layout, Placed):
        return Form(dtype, shape, grids.setdefault(layout.grid, len(grids)), layout.splits)
    if isinstance(layout, Listed):
        return Form(dtype, shape, boxes=tuple(box for rank in layout.ranks for box in layout.boxes(rank)))
    return Form(dtype, shape)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def packed(description: bytes) -> bytes:
    return zlib.compress(description, 1)


def unpacked(data: bytes) -> Description:
    """The inverse of `packed`, decoded."""
    names, letters, forms, table, ties, flags_known, overlaps, *rest = json.loads(zlib.decompress(data))
    return Description(
        names,
        letters,
        forms,
        [_decoded(*form) for form in table],
        [(position, first) for position, first in ties],
        flags_known,
        [(left, right) for left, right in overlaps],
        *rest,
    )


def _decoded(dtype: str, shape: list[int], mesh: int, splits: list[list[int]], boxes: list[Any] | None) -> Form:
    listed = None if boxes is None else tuple((tuple(begin), tuple(sizes)) for begin, sizes in boxes)
    return Form(dtype, tuple(shape), mesh, tuple(Split(*split) for split in splits), listed)


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def encoded_grids(grids: Sequence[Grid]) -> bytes:
    """``grids``, in few bytes if the ranks in them are evenly spaced."""
    return json.dumps([_evenly_spaced(grid) or [grid.ranks, grid.sizes] for grid in grids], separators=(",", ":")).encode()


def decoded_grids(data: bytes) -> list[Grid]:
    return [_grid(*fields) for fields in json.loads(data)]


def _evenly_spaced(grid: Grid) -> list[Any] | None:
    """The first rank, the sizes and the steps along each dimension, if that is all that there is to say."""
    ranks = np.array(grid.ranks, dtype=np.int64).reshape(grid.sizes)
    first = int(ranks.flat[0])
    steps = [
        int(ranks[(0,) * dim + (1,) + (0,) * (ranks.ndim - dim - 1)]) - first if size > 1 else 0
        for dim, size in enumerate(grid.sizes)
    ]
    evenly = first + sum(step * index for step, index in zip(steps, np.indices(grid.sizes)))
    return [first, grid.sizes, steps] if np.array_equal(ranks, evenly) else None


def _grid(first: Any, sizes: list[int], steps: list[int] | None = None) -> Grid:
    if steps is None:
        return Grid(first, sizes)
    ranks = first + sum((step * index for step, index in zip(steps, np.indices(sizes))), np.zeros(sizes, dtype=np.int64))
    return Grid(ranks.flatten().tolist(), sizes)
