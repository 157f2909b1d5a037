"""Copies the shares of a block between local tensors, windows and parcels."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from shardsave._common.boxes import box, copy_in, copy_out
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.spread import Spread
from shardsave._engine import box_copies
from shardsave._engine.box_copies import Row
from shardsave._ranks.shares import BlockShares, Run, Share, element_strides, nbytes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Where bytes go: into a window or a parcel, or out of it into local tensors.
Way = Literal["in", "out"]

#: The number of a local box, and a row whose addresses count from there.
_LocalRow = tuple[int, int, int, int, int, int, int, int, int, int]


class Local:
    """The local boxes of tensors, from which shares are copied (``way`` "in") or into which ("out").

    Threads: all methods may be called on any.
    """

    def __init__(self, way: Way) -> None:
        self._way = way
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Run, _Held]] = {}  # by the identity of the run
        self._kinds: dict[Hashable, int] = {}
        self._streams: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        self._rows: dict[tuple[int, int, bool], list[_LocalRow]] = {}

    def follow_caller(self, devices: Iterable[int]) -> None:
        """Copies from and to CUDA ``devices`` will wait for what is now in the calling thread's current streams there."""
        for device in {*devices} - {-1}:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device] = stream, torch.cuda.current_stream(device).record_event()

    def copy(self, shares: BlockShares, address: int, *, packed: bool = False) -> int:
        """Copies ``shares`` to or from the block at ``address``, or the parcel that they make up. Returns the number of bytes."""
        nbytes = shares.nbytes
        place = address + (np.cumsum(nbytes) - nbytes if packed else shares.at)
        held = self._held_of(shares.run)
        kind = held.kind[shares.piece]
        for n in np.flatnonzero(kind == _NOT_PLAIN).tolist():
            self._copy_by_torch(shares.tensor(n), shares.shares[shares.form[n]], int(place[n]), packed=packed)
        plain = np.flatnonzero(kind != _NOT_PLAIN)
        kinds = len(self._kinds)
        alike = shares.form[plain] * kinds + kind[plain]
        _, first, number = np.unique(alike, return_index=True, return_inverse=True)
        rows_of_each = [self._rows_of(shares, n, int(kind[n]), packed=packed) for n in plain[first].tolist()]
        rows, of = _joined(rows_of_each, number, width=10)
        here = held.addresses[held.first[shares.piece[plain[of]]] + rows[:, 0]]
        _copy(rows[:, 1:], *((here, place[plain[of]]) if self._way == "in" else (place[plain[of]], here)))
        return int(nbytes.sum())

    def _rows_of(self, shares: BlockShares, n: int, kind: int, *, packed: bool) -> list[_LocalRow]:
        """The rows for the shares of segment ``n``, and of all that have the same form and kind."""
        found = shares.shares[shares.form[n]]
        key = id(found), kind, packed  # shares are kept as long as this object
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = list(_rows(shares.tensor(n), found, packed=packed, inward=self._way == "in"))
        return rows

    def _held_of(self, run: Run) -> _Held:
        with self._lock:
            if id(run) not in self._held:
                self._held[id(run)] = run, self._look_at(run)
            return self._held[id(run)][1]

    def _look_at(self, run: Run) -> _Held:
        kinds, first = [], []
        addresses: list[int] = []
        for tensor in run.tensors:
            first.append(len(addresses))
            kinds.append(_NOT_PLAIN if tensor is None else self._kind(tensor))
            if tensor is not None and kinds[-1] != _NOT_PLAIN:
                addresses += [chunk.tensor.data_ptr() for chunk in tensor.local]
        return _Held(*(np.array(column, dtype=np.int64) for column in (kinds, first, addresses)))

    def _kind(self, tensor: Spread) -> int:
        """A number for all tensors of which this rank has the same boxes with the same strides."""
        strides = [held.stride() for _, held in tensor.local if _is_plain(held, tensor.dtype)]
        if len(strides) < len(tensor.local):
            return _NOT_PLAIN
        return self._kinds.setdefault((id(tensor.layout), tensor.dtype, *strides), len(self._kinds))

    def _copy_by_torch(self, tensor: Spread, shares: Iterable[Share], place: int, *, packed: bool) -> None:
        """Through memory of its own: for tensors on a device, of another dtype or of a class that hides where its data is."""
        item = tensor.dtype.itemsize
        for share in shares:
            begin, sizes, offset = share
            chunk = tensor.local[holding(tensor, begin, sizes)]
            staged = torch.empty(sizes, dtype=tensor.dtype, device="cpu")
            own = byte_strides(sizes, item)
            there = own if packed else byte_strides(tensor.layout.shape, item)
            at, memory = place + (0 if packed else offset), staged.data_ptr()
            elements = chunk.tensor.detach()[box([a - b for a, b in zip(begin, chunk.begin)], sizes)]
            with torch.no_grad(), self._on_stream(chunk.tensor):
                if self._way == "in":
                    copy_out(elements, staged)
                    _copy(np.array(box_copies.rows(sizes, own, there, item)), memory, at)
                else:
                    _copy(np.array(box_copies.rows(sizes, there, own, item)), at, memory)
                    copy_in(staged, elements)
            place += nbytes_of(share, tensor) if packed else 0

    @contextmanager
    def _on_stream(self, tensor: torch.Tensor) -> Iterator[None]:
        """In a stream of this exchange, since a thread's own current stream would not wait for the caller's work."""
        stream, event = self._streams.get(tensor.get_device(), (None, None)) if tensor.is_cuda else (None, None)
        if stream is None or event is None:
            yield
            return
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


class _Held(NamedTuple):
    """What this rank holds of the tensors of a run. Columns, with a row for each piece: its `Local._kind`, or -1 if torch must copy; the
    place of its first box in ``addresses``, where the others follow."""

    kind: NDArray[np.int64]
    first: NDArray[np.int64]
    addresses: NDArray[np.int64]


_NOT_PLAIN = -1


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of ``tensor`` is on the host, and has its elements as the file does."""
    if type(tensor) not in PLAIN_TYPES or not tensor.is_cpu or tensor.dtype != dtype or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_neg() or tensor.is_conj())


def _rows(tensor: Spread, shares: Iterable[Share], *, packed: bool, inward: bool) -> Iterator[_LocalRow]:
    """The rows that copy shares of one segment; addresses count from the chunk and the segment."""
    item, done = tensor.dtype.itemsize, 0
    for share in shares:
        begin, sizes, offset = share
        number = holding(tensor, begin, sizes)
        chunk = tensor.local[number]
        strides = tuple(stride * item for stride in chunk.tensor.stride())
        first = sum((a - b) * stride for a, b, stride in zip(begin, chunk.begin, strides))
        there = byte_strides(sizes if packed else tensor.layout.shape, item)
        place = done if packed else offset
        done += nbytes_of(share, tensor)
        if inward:
            for row in box_copies.rows(sizes, strides, there, item):
                yield number, first + row[0], place + row[1], *row[2:]
        else:
            for row in box_copies.rows(sizes, there, strides, item):
                yield number, place + row[0], first + row[1], *row[2:]


def copy_parcel(shares: BlockShares, window: int, parcel: int, way: Way) -> None:
    """Copies the ``parcel`` that ``shares`` make up into the ``window`` of their block, or out of it. Both are addresses."""
    nbytes = shares.nbytes
    packed, whole = parcel + np.cumsum(nbytes) - nbytes, window + shares.at
    rows_of_each = [list(_parcel_rows(form.tensor, found, way)) for form, found in zip(shares.forms, shares.shares)]
    rows, of = _joined(rows_of_each, shares.form, width=9)
    _copy(rows, *((packed[of], whole[of]) if way == "in" else (whole[of], packed[of])))


def _parcel_rows(tensor: Spread, shares: Iterable[Share], way: Way) -> Iterator[Row]:
    """The rows that copy shares of one segment between a parcel and a window; addresses count from their places there."""
    item, done = tensor.dtype.itemsize, 0
    for share in shares:
        packed, whole = byte_strides(share.sizes, item), byte_strides(tensor.layout.shape, item)
        if way == "in":
            for row in box_copies.rows(share.sizes, packed, whole, item):
                yield done + row[0], share.offset + row[1], *row[2:]
        else:
            for row in box_copies.rows(share.sizes, whole, packed, item):
                yield share.offset + row[0], done + row[1], *row[2:]
        done += nbytes_of(share, tensor)


def _joined(
    tables: Sequence[Sequence[tuple[int, ...]]], number: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of ``tables[number[0]]``, ``tables[number[1]]``, … one after another, and for each of them which of these it is from."""
    rows = np.array([row for table in tables for row in table], dtype=np.int64).reshape(-1, width)
    counts = np.array([len(table) for table in tables], dtype=np.int64)
    begins = np.cumsum(counts) - counts
    counts, begins = counts[number], begins[number]
    of = np.repeat(np.arange(len(number)), counts)
    step = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows[begins[of] + step], of


def _copy(rows: NDArray[np.int64], source: NDArray[np.int64] | int, destination: NDArray[np.int64] | int) -> None:
    """Copies what ``rows`` say, whose addresses count from ``source`` and ``destination``."""
    if len(rows):
        table = np.ascontiguousarray(rows)
        table[:, 0] += source
        table[:, 1] += destination
        box_copies.copy(table)


def holding(tensor: Spread, begin: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """The number of the local chunk that holds a box."""
    for number, chunk in enumerate(tensor.local):
        if all(b <= a and a + n <= b + m for a, n, b, m in zip(begin, sizes, chunk.begin, chunk.tensor.shape)):
            return number
    raise AssertionError(f"no local chunk holds the box of {sizes} at {begin}")


@lru_cache(maxsize=1 << 12)
def byte_strides(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    """The strides of ``shape`` in C order, in bytes."""
    return tuple(stride * item for stride in element_strides(shape))
