"""Tensors of a module that share a part of their memory: slices, transposes and reshapes of one another.

The file has the values of each. If they agree where the memory is shared, all of them are filled, one after the other; if not, the
module is refused, since one would overwrite the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardsave._common.memory import any_overlap
from shardsave._loading.mapped import Maps
from shardsave._loading.slots import Slot
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located

#: The most work that numpy may spend to decide whether two strided views share an element.
_OVERLAP_WORK = 100_000

#: How many elements are compared at a time.
_PIECE_ELEMENTS = 1 << 18


def overlaps(slots: Sequence[Slot], reaches: Sequence[int], owners: Mapping[str, str]) -> Iterator[tuple[Slot, Slot]]:
    """Pairs of ``slots``, all strided tensors, that share an element and are filled separately; the second has the higher address.

    ``reaches``: the `reach` of each, never 0. ``owners``: name of a tensor that a routine fills → the routine's sub-module. Tensors of
    one such sub-module may overlap.
    """
    begins = [slot.address for slot in slots]
    ends = [begin + reach for begin, reach in zip(begins, reaches)]
    if not any_overlap(begins, ends):
        return
    spans = [(str(slot.memory.device), begin, end, slot) for begin, end, slot in zip(begins, ends, slots)]
    spans.sort(key=lambda span: span[:3])
    alive: list[tuple[str, int, int, Slot]] = []
    for span in spans:
        device, begin, _, slot = span
        owner = owners.get(slot.name)
        alive = [other for other in alive if other[0] == device and other[2] > begin]
        for *_, other in alive:
            if (owner is None or owner != owners.get(other.name)) and _share_an_element(other.memory, slot.memory):
                yield other, slot
        alive.append(span)


def agree(checkpoint: Checkpoint, left: tuple[Located, torch.Tensor], right: tuple[Located, torch.Tensor]) -> bool:
    """Whether the file has the same bytes for two tensors at each element of memory that they share.

    Each stored tensor comes with the tensor that it fills, of whose elements no two share memory. If their dtypes are not the same, or
    one begins within an element of the other, they are compared byte by byte. False if the load casts one of them.
    """
    (stored_a, a), (stored_b, b) = (left, right) if left[1].numel() >= right[1].numel() else (right, left)
    if not (stored_a.shard and stored_b.shard):
        return False
    distance = b.data_ptr() - a.data_ptr()
    kinds = {(a.dtype, a.is_conj(), a.is_neg(), stored_a.dtype), (b.dtype, b.is_conj(), b.is_neg(), stored_b.dtype)}
    maps = Maps(checkpoint, aligned=False)
    values_a, values_b = maps.tensor(stored_a), maps.tensor(stored_b)
    if len(kinds) > 1 or distance % a.element_size():
        if (values_a.dtype, values_b.dtype) != (a.dtype, b.dtype) or any(t.is_conj() or t.is_neg() for t in (a, b)):
            return False
        values_a, values_b = (values.reshape(-1).view(torch.uint8) for values in (values_a, values_b))
        a, b = _bytes_of(a), _bytes_of(b)
    elements_a, elements_b = _elements(values_a), _elements(values_b)
    if len(elements_a) != a.numel() or len(elements_b) != b.numel():
        return False
    for first in range(0, b.numel(), _PIECE_ELEMENTS):
        places = np.arange(first, min(first + _PIECE_ELEMENTS, b.numel()), dtype=np.int64)
        offsets = distance // a.element_size() + _offsets(places, b)
        places_in_a, shared = _places(offsets, a)
        if not np.array_equal(elements_a[places_in_a[shared]], elements_b[places[shared]]):
            return False
    return True


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that has the shape and strides of the bytes of ``tensor``."""
    item = tensor.element_size()
    strides = (*(stride * item for stride in tensor.stride()), 1)
    return torch.empty_strided((*tensor.shape, item), strides, dtype=torch.uint8, device="meta")


def _elements(tensor: torch.Tensor) -> NDArray[Any]:
    """The elements of a contiguous tensor, each as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().reshape(-1, tensor.element_size())


def _offsets(places: NDArray[np.int64], tensor: torch.Tensor) -> NDArray[np.int64]:
    """How many elements after the first one the memory of ``tensor`` has those that are at ``places`` in C order."""
    offsets, step = np.zeros_like(places), 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        offsets += places // step % size * stride
        step *= size
    return offsets


def _places(offsets: NDArray[np.int64], tensor: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The inverse of `_offsets`, and which of ``offsets`` are elements of ``tensor``. The larger strides reach over the smaller ones."""
    steps = [math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.dim())]
    dims = sorted(zip(tensor.stride(), tensor.shape, steps), reverse=True)
    places, inside, left = np.zeros_like(offsets), np.ones(len(offsets), dtype=np.bool_), offsets
    for stride, size, step in dims:
        if size > 1:
            index = left // stride
            inside &= (index >= 0) & (index < size)
            places += index * step
            left = left - index * stride
    return places, inside & (left == 0)


def _share_an_element(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Exact, also for interleaved views; a case that is too hard to decide counts as shared."""
    try:
        return np.shares_memory(_as_array(left), _as_array(right), max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except RuntimeError:  # numpy's TooHardError, which moved between its versions
        return True


def _as_array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    """An array at the address of ``tensor``, for arithmetic only: the address may be on a device and is never read."""
    item = tensor.element_size()

    class Interface:
        def __init__(self) -> None:
            self.__array_interface__ = {
                "version": 3,
                "typestr": f"|V{item}",
                "shape": tuple(tensor.shape),
                "strides": tuple(stride * item for stride in tensor.stride()),
                "data": (tensor.data_ptr(), True),
            }

    return np.asarray(Interface())
