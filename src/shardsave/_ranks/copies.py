"""Copies the shares of a block between local tensors, windows and parcels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from shardsave._common.boxes import box, copy_in, copy_out
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.spread import Spread
from shardsave._engine import box_copies
from shardsave._engine.box_copies import Row
from shardsave._ranks.shares import Segment, Share, element_strides, nbytes_of

#: Where bytes go: into a window or a parcel, or out of it into local tensors.
Way = Literal["in", "out"]


class Local:
    """The local boxes of tensors, from which shares are copied (``way`` "in") or into which ("out")."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._held: dict[int, tuple[Spread, _Held]] = {}
        self._kinds: dict[Hashable, int] = {}
        self._streams: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
        self._rows: dict[tuple[int, int, bool], tuple[list[tuple[int, Row]], int]] = {}

    def follow_caller(self, devices: Iterable[int]) -> None:
        """Copies from and to CUDA ``devices`` will wait for what is now in the calling thread's current streams there."""
        for device in {*devices} - {-1}:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device] = stream, torch.cuda.current_stream(device).record_event()

    def copy(self, shares: Iterable[tuple[Segment, tuple[Share, ...]]], address: int, *, packed: bool = False) -> int:
        """Copies ``shares`` to or from the block at ``address``, or the parcel that they make up. Returns the number of bytes."""
        inward, done = self._way == "in", 0
        rows: list[tuple[int, ...]] = []
        for (tensor, _, _, _, at), found in shares:
            place = address + (done if packed else at)
            addresses, kind = self._held_of(tensor)
            key = id(found), kind, packed  # shares are kept as long as this object
            known = self._rows.get(key)
            if known is None:
                copies = list(_rows(tensor, found, packed=packed, inward=inward)) if kind >= 0 else []
                known = self._rows[key] = copies, sum(nbytes_of(share, tensor) for share in found)
            copies, nbytes = known
            done += nbytes
            if kind < 0:
                self._copy_by_torch(tensor, found, place, packed=packed)
            for chunk, (here, there, *rest) in copies:
                if inward:
                    rows.append((addresses[chunk] + here, place + there, *rest))
                else:
                    rows.append((place + here, addresses[chunk] + there, *rest))
        _copy(rows)
        return done

    def _held_of(self, tensor: Spread) -> _Held:
        known = self._held.get(id(tensor))
        if known is None:
            known = self._held[id(tensor)] = tensor, self._look_at(tensor)
        return known[1]

    def _look_at(self, tensor: Spread) -> _Held:
        form: list[Hashable] = [tensor.dtype.itemsize]
        addresses = []
        for begin, held in tensor.local:
            if not _is_plain(held, tensor.dtype):
                return _NOT_PLAIN
            form += begin, held.shape, held.stride()
            addresses.append(held.data_ptr())
        return _Held(tuple(addresses), self._kinds.setdefault(tuple(form), len(self._kinds)))

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
                    _copy([(memory + row[0], at + row[1], *row[2:]) for row in box_copies.rows(sizes, own, there, item)])
                else:
                    _copy([(at + row[0], memory + row[1], *row[2:]) for row in box_copies.rows(sizes, there, own, item)])
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
    """The addresses of the local boxes of a tensor, and a number for all that have the same boxes and strides; -1 if torch must copy."""

    addresses: tuple[int, ...]
    kind: int


_NOT_PLAIN = _Held((), -1)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of ``tensor`` is on the host, and has its elements as the file does."""
    if type(tensor) not in PLAIN_TYPES or not tensor.is_cpu or tensor.dtype != dtype or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_neg() or tensor.is_conj())


def _rows(tensor: Spread, shares: Iterable[Share], *, packed: bool, inward: bool) -> Iterator[tuple[int, Row]]:
    """The rows that copy shares of one segment, each with the number of the chunk; addresses count from the chunk and the segment."""
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
                yield number, (first + row[0], place + row[1], *row[2:])
        else:
            for row in box_copies.rows(sizes, there, strides, item):
                yield number, (place + row[0], first + row[1], *row[2:])


def copy_parcel(shares: Iterable[tuple[Segment, tuple[Share, ...]]], window: int, parcel: int, way: Way) -> None:
    """Copies the ``parcel`` that ``shares`` make up into the ``window`` of their block, or out of it. Both are addresses."""
    rows: list[Row] = []
    for segment, found in shares:
        item, shape = segment.tensor.dtype.itemsize, segment.tensor.layout.shape
        for share in found:
            packed, whole = byte_strides(share.sizes, item), byte_strides(shape, item)
            at = window + segment.at + share.offset
            if way == "in":
                rows += [(parcel + row[0], at + row[1], *row[2:]) for row in box_copies.rows(share.sizes, packed, whole, item)]
            else:
                rows += [(at + row[0], parcel + row[1], *row[2:]) for row in box_copies.rows(share.sizes, whole, packed, item)]
            parcel += nbytes_of(share, segment.tensor)
    _copy(rows)


def _copy(rows: Sequence[tuple[int, ...]]) -> None:
    if rows:
        box_copies.copy(np.array(rows, dtype=np.int64))


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
