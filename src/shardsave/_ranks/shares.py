"""Which bytes of a block come from which boxes of which rank: the same arithmetic on all ranks, so nothing about it is sent."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardsave._common import boxes
from shardsave._common.layouts import Extent
from shardsave._common.spread import Spread, kinds_of
from shardsave._engine.blocks import Blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: From so many boxes on, those that may meet a range are found in numpy.
_MANY = 16


class Run(NamedTuple):
    """What the engine of one rank moves. For each piece of ``blocks``: ``tensors``, the tensor that it belongs to, or None if other ranks
    have no part in it; ``starts``: the byte of the tensor at which it begins."""

    blocks: Blocks
    tensors: Sequence[Spread | None]
    starts: Sequence[int]


class Share(NamedTuple):
    """Elements of a tensor that one rank gives or takes: a box that begins at index ``begin``, ``offset`` bytes after the beginning of the
    segment in which it lies. There, its strides are those of the whole tensor in C order."""

    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int


class Form(NamedTuple):
    """Segments that are alike: the bytes ``start`` to ``start + length`` of tensors with the same layout and dtype. ``tensor``: one."""

    tensor: Spread
    start: int
    length: int

    @property
    def elements(self) -> tuple[int, int]:
        """The number of the first element, and of the one after the last."""
        item = self.tensor.dtype.itemsize
        return self.start // item, (self.start + self.length) // item


class _Segments(NamedTuple):
    """The segments of a run that belong to tensors, in the order of blocks. Columns: the piece of each, the byte of its block at which it
    begins, and its number in ``forms``. ``firsts``: the first segment of each block, then the number of all."""

    piece: NDArray[np.int64]
    at: NDArray[np.int64]
    form: NDArray[np.int64]
    firsts: NDArray[np.int64]
    forms: Sequence[Form]

    def of_block(self, block: int) -> slice:
        return slice(int(self.firsts[block]), int(self.firsts[block + 1]))


class BlockShares(NamedTuple):
    """What one rank has in a block of ``run``, segment by segment. Columns: the piece of each, the byte of the block at which it begins,
    and its number in ``forms`` and ``shares``: those of one segment travel in this order."""

    run: Run
    piece: NDArray[np.int64]
    at: NDArray[np.int64]
    form: NDArray[np.int64]
    forms: Sequence[Form]
    shares: Sequence[tuple[Share, ...]]

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """The bytes of the shares in each segment."""
        of_forms = [sum(nbytes_of(share, form.tensor) for share in shares) for form, shares in zip(self.forms, self.shares)]
        return np.array(of_forms, dtype=np.int64)[self.form]

    def tensor(self, n: int) -> Spread:
        """The tensor of segment ``n``."""
        tensor: Spread | None = self.run.tensors[int(self.piece[n])]
        assert tensor is not None
        return tensor


class Shares:
    """``run_of(owner)``: what each rank moves. ``takers(tensor, owner)``: which ranks take part in the tensor, each with which boxes;
    a rank may have several, and also the owner itself.

    Many tensors are of few forms, and what is computed for one is kept for the others. Threads: all methods may be called on any.
    """

    def __init__(self, run_of: Callable[[int], Run], takers: Callable[[Spread, int], Mapping[int, Sequence[Extent]]]) -> None:
        self._run_of = run_of
        self._takers = takers
        self._segments: dict[int, _Segments] = {}  # of each owner
        self._lock = threading.Lock()
        self._shares: dict[tuple[int, int, int], tuple[Share, ...]] = {}
        self._taking: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}

    def of(self, owner: int, block: int, rank: int) -> BlockShares:
        """What ``rank`` has in a block of ``owner``."""
        segments = self._segments_of(owner)
        part = segments.of_block(block)
        numbers, form = np.unique(segments.form[part], return_inverse=True)
        shares = [self._shares_of(owner, number, rank) for number in numbers.tolist()]
        some = np.array([bool(found) for found in shares], dtype=bool)[form]
        forms = [segments.forms[number] for number in numbers.tolist()]
        return BlockShares(self._run_of(owner), segments.piece[part][some], segments.at[part][some], form[some], forms, shares)

    def taking(self, owner: int, block: int) -> dict[int, int]:
        """The ranks that take part in a block, each with the bytes of its shares."""
        segments = self._segments_of(owner)
        numbers, counts = np.unique(segments.form[segments.of_block(block)], return_counts=True)
        taking: dict[int, int] = {}
        for number, count in zip(numbers.tolist(), counts.tolist()):
            for rank, nbytes in self._taking_of(owner, number):
                taking[rank] = taking.get(rank, 0) + count * nbytes
        return taking

    def _segments_of(self, owner: int) -> _Segments:
        with self._lock:  # one thread computes them, the others wait
            if owner not in self._segments:
                self._segments[owner] = _segments(self._run_of(owner))
            return self._segments[owner]

    def _shares_of(self, owner: int, number: int, rank: int) -> tuple[Share, ...]:
        """The shares of ``rank`` in segments of ``owner`` that have the form ``number``."""
        key = owner, number, rank
        found = self._shares.get(key)
        if found is None:
            form = self._segments[owner].forms[number]
            tensor = form.tensor
            shares = tuple(
                Share(begin, sizes, offset * tensor.dtype.itemsize)
                for box in self._takers(tensor, owner).get(rank, ())
                for begin, sizes, offset in meeting(tensor.layout.shape, *form.elements, *box)
            )
            found = self._shares.setdefault(key, shares)
        return found

    def _taking_of(self, owner: int, number: int) -> tuple[tuple[int, int], ...]:
        """The ranks that take part in a segment of the form ``number``, with the bytes of each."""
        found = self._taking.get((owner, number))
        if found is None:
            form = self._segments[owner].forms[number]
            ranks = near(self._takers(form.tensor, owner), form.tensor.layout.shape, *form.elements)
            counts = [
                (rank, sum(nbytes_of(share, form.tensor) for share in self._shares_of(owner, number, rank))) for rank in ranks
            ]
            found = self._taking[owner, number] = tuple((rank, nbytes) for rank, nbytes in counts if nbytes)
        return found


def _segments(run: Run) -> _Segments:
    """The segments of ``run`` that belong to tensors."""
    table, segments, _ = run.blocks
    tensors = [tensor for tensor in run.tensors if tensor is not None]
    kinds, first = kinds_of(tensors)
    kind = np.full(len(run.tensors), -1, dtype=np.int64)
    kind[np.array([tensor is not None for tensor in run.tensors], dtype=bool)] = kinds
    shared = kind[segments[:, 0]] >= 0
    firsts = np.append(0, np.cumsum(shared))[np.append(table[:, 3], len(segments))]
    piece, offset, length, at = segments[shared].T
    start = np.array(run.starts, dtype=np.int64)[piece] + offset
    numbers: dict[tuple[int, int, int], int] = {}
    form = [numbers.setdefault(key, len(numbers)) for key in zip(kind[piece].tolist(), start.tolist(), length.tolist())]
    forms = [Form(first[of_kind], begin, nbytes) for of_kind, begin, nbytes in numbers]
    return _Segments(piece, at, np.array(form, dtype=np.int64), firsts, forms)


def nbytes_of(share: Share, tensor: Spread) -> int:
    """The bytes of a share of ``tensor``."""
    return math.prod(share.sizes) * tensor.dtype.itemsize


class _Bounds:
    """The first dimension of the boxes of many ranks, for `near`."""

    def __init__(self, takers: Mapping[int, Sequence[Extent]]) -> None:
        rows = [(rank, begin[0], begin[0] + sizes[0]) for rank, held in takers.items() for begin, sizes in held]
        self.rank, self.begin, self.stop = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        self.takers = takers


_bounds: dict[int, _Bounds] = {}


def near(takers: Mapping[int, Sequence[Extent]], shape: Sequence[int], first: int, stop: int) -> Sequence[int]:
    """The ranks whose boxes may meet elements ``first`` to ``stop``."""
    if len(takers) < _MANY or not shape:
        return [*takers]
    bounds = _bounds.get(id(takers))
    if bounds is None or bounds.takers is not takers:
        if len(_bounds) > 1 << 10:
            _bounds.clear()
        bounds = _bounds[id(takers)] = _Bounds(takers)
    row = max(1, math.prod(shape[1:]))
    meets = (bounds.begin <= (stop - 1) // row) & (bounds.stop > first // row)
    return [*dict.fromkeys(bounds.rank[meets].tolist())]


@lru_cache(maxsize=1 << 16)
def meeting(
    shape: tuple[int, ...], first: int, stop: int, begin: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]:
    """What a box has of the elements ``first`` to ``stop`` in C order, as boxes: where each begins, its sizes, and how many elements after
    ``first`` it begins."""
    strides = element_strides(shape)
    found = []
    for box in boxes.boxes(shape, first, stop):
        low = tuple(max(rows.start, at) for rows, at in zip(box, begin)) + begin[len(box) :]
        high = tuple(min(rows.stop, at + n) for rows, at, n in zip(box, begin, sizes))
        high += tuple(at + n for at, n in zip(begin[len(box) :], sizes[len(box) :]))
        if all(a < b for a, b in zip(low, high)):
            offset = sum(at * stride for at, stride in zip(low, strides)) - first
            found.append((low, tuple(b - a for a, b in zip(low, high)), offset))
    return tuple(found)


@lru_cache(maxsize=1 << 12)
def element_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of ``shape`` in C order, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
