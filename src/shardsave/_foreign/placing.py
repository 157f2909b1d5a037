"""Puts tensors in the place of what a pickle says of them: views of the file, and arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Union

import torch

from shardsave._foreign.containers import Attributed, Unread, UnreadArray
from shardsave._foreign.pickle_refusals import refuse_damaged
from shardsave._foreign.pickled_arrays import Array
from shardsave._foreign.pickled_tensors import Described, Storage, StorageType, WithAttributes
from shardsave._foreign.records import Forbidden, Record
from shardsave._foreign.unpickling import MAX_PICKLE_BYTES

#: The most attributes of all tensors. A pickle may use the same ones for any number of tensors.
_MAX_ATTRIBUTES = 1_000_000


class Placing:
    """Replaces each description of a tensor in a content by a tensor in the bytes of its storage."""

    def __init__(self, bytes_of: Callable[[Storage], torch.Tensor], path: str) -> None:
        self._bytes_of, self._path = bytes_of, path
        self._storages: dict[str, torch.Tensor] = {}
        self._array_bytes = self._attributes = 0
        self._placed: dict[int, Any] = {}  # by the identity of a container, which may be in many others

    def place(self, content: Any) -> Any:
        """``content`` with tensors. The content has to stay alive meanwhile."""
        if isinstance(content, Described):
            return self._tensor(content)
        if isinstance(content, WithAttributes):
            return self._attributed(content)
        if isinstance(content, (Storage, StorageType)):
            return Unread("storage")
        if id(content) in self._placed:
            return self._placed[id(content)]
        if isinstance(content, Mapping):
            placed: Any = {key: self.place(value) for key, value in content.items()}
        elif isinstance(content, (list, tuple, set, frozenset)):
            placed = [self.place(value) for value in content]
        elif isinstance(content, Array) and (array := self._array(content)) is not None:
            placed = array
        elif isinstance(content, Record):
            self._placed[id(content)] = content  # it may refer to itself
            return content.placed(self.place)
        else:
            return content
        self._placed[id(content)] = placed
        return placed

    def _attributed(self, content: WithAttributes) -> Attributed:
        attributes: dict[str, Any] = {}
        for state in content.states:
            placed = self.place(state)
            self._attributes += len(placed) if isinstance(placed, dict) else 1
            if self._attributes > _MAX_ATTRIBUTES:
                refuse_damaged(self._path, f"its tensors have more than {_MAX_ATTRIBUTES} attributes")
            attributes.update({str(k): v for k, v in placed.items()} if isinstance(placed, dict) else {"(state)": placed})
        kind = f"tensor of class {content.subclass}" if content.subclass else "tensor"
        return Attributed(kind, self.place(content.tensor), attributes, is_subclass=content.subclass is not None)

    def _charge(self, nbytes: int) -> None:
        """Counts the bytes of arrays. They are in the pickle; but a pickle may use the same bytes for any number of arrays."""
        self._array_bytes += nbytes
        if self._array_bytes > MAX_PICKLE_BYTES:
            raise Forbidden("has arrays of more bytes than a pickle may have")

    def _array(self, array: Array) -> Union[torch.Tensor, UnreadArray, None]:
        try:
            return array.read(self._charge)
        except (Forbidden, ValueError) as error:
            refuse_damaged(self._path, f"its pickle is broken (it {error})")

    def _tensor(self, described: Described) -> torch.Tensor:
        storage, dtype, offset, shape, strides, is_conj, is_neg = described
        found = f"a tensor of {shape} does not lie in its {storage.nbytes} bytes"
        try:
            if math.prod(shape) == 0:
                return torch.empty(shape, dtype=dtype, device="cpu")
            end = offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
            if storage.begin + end * dtype.itemsize > storage.nbytes:
                refuse_damaged(self._path, found)
            if storage.key not in self._storages:
                self._storages[storage.key] = self._bytes_of(storage)
            memory = self._storages[storage.key][storage.begin :]
            tensor = _view(memory, described)
            if tensor.data_ptr() % dtype.itemsize and not (tensor.is_contiguous() and not is_conj and not is_neg):
                tensor = _view(memory.clone(), described)  # only whole bytes can be copied from where the file has them
        except (RuntimeError, TypeError, OverflowError) as error:
            refuse_damaged(self._path, f"{found} ({type(error).__name__})")
        tensor = tensor.conj() if is_conj else tensor
        return torch._neg_view(tensor) if is_neg else tensor


def _view(memory: torch.Tensor, described: Described) -> torch.Tensor:
    """The described tensor in the bytes of its storage."""
    # A slice shares the storage of what it is a slice of, and counts from there.
    begin = memory.storage_offset()
    storage = memory.untyped_storage()[begin : begin + memory.numel()] if begin else memory.untyped_storage()
    empty = torch.empty(0, dtype=described.dtype, device="cpu")
    return empty.set_(storage, described.offset, described.shape, described.strides)
