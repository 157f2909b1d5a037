"""Writes Python values as values of a training document, and collects the tensors in them.

Plain JSON is None, bool, int, str and finite float. All else is an object whose first member is its tag: see FORMAT.md.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from shardsave._common.memory import PLAIN_TYPES, memory_key
from shardsave._common.sources import TensorSource
from shardsave._common.strict_json import MAX_DIGITS
from shardsave._common.words import an
from shardsave._state.distributed_tensors import LocalPart, PartReader, is_distributed
from shardsave._state.module import Entry
from shardsave._state.numpy_arrays import is_swapped, tensor_of_array
from shardsave._state.savable import all_usual, check_savable
from shardsave._training.distributed import TAG as BOXES
from shardsave._training.distributed import part_of, placements_in_words, refuse_alone
from shardsave._training.places import Place, refuse, refuse_value
from shardsave._training.subclasses import write_subclass

#: How deep values may be nested: far less than the stack of any JSON reader allows.
MAX_DEPTH = 64

#: The dtypes of numpy scalars.
SCALARS = frozenset(
    ["bool", "complex64", "complex128", "float16", "float32", "float64"]
    + [f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)]
)

#: Types of keys and of elements of sets that are the same after they were read: hashed by value, not by identity.
_KEYS = frozenset({type(None), bool, int, float, str, bytes, tuple})

_LARGEST = 10**MAX_DIGITS
_LIKE_RANK = re.compile(r"rank \d+/")


def belongs_to_rank(name: str) -> bool:
    """Whether a stored tensor with this name belongs to one rank."""
    return name.startswith("rank ") and _LIKE_RANK.match(name) is not None


class ValueWriter:
    """Writes values. Tensors become entries; the same memory is one entry, under its first name.

    ``prefix``: what the names of all entries begin with, if they belong to one rank. ``parts``: reads distributed tensors; None if this
    process alone saves. ``has_distributed``: whether one was written. Raises UnsupportedTrainingError or UnsupportedTensorError, naming
    the place.
    """

    def __init__(self, prefix: str = "", parts: PartReader | None = None) -> None:
        self.entries: list[Entry] = []
        self.has_distributed = False
        self._prefix = prefix
        self._parts = parts
        self._distributed: dict[Hashable, tuple[Any, Any]] = {}  # identity or memory → a tensor that keeps it, and its value
        self._names: set[str] = set()
        self._first_at: dict[int, tuple[str, torch.Tensor]] = {}
        self._above: list[int] = []  # the containers around the value that is being written, by id

    def value(self, value: Any, place: Place) -> Any:
        """The JSON of ``value``."""
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is int:
            if abs(value) >= _LARGEST:
                refuse(place, f"whole numbers of at most {MAX_DIGITS} digits were", "it is longer")
            return value
        if kind is str:
            return _text(value, place)
        if isinstance(value, torch.Tensor):
            return self._tensor_value(value, place)
        if isinstance(value, (dict, list, set)) or kind in (tuple, torch.Size):
            return self._container(value, place)
        return self._other(value, place)

    def tensor(self, tensor: torch.Tensor, name: str, path: str) -> str:
        """The name under which ``tensor``, at ``path``, is stored: ``name`` behind the prefix, or that of the same memory."""
        name = self._prefix + name
        check_savable(path, tensor)
        address = tensor.data_ptr()
        known = self._first_at.get(address)
        if known is not None and memory_key(known[1]) == memory_key(tensor):
            return known[0]
        name = self._take(name)
        if known is None and address:
            self._first_at[address] = name, tensor
        # `Tensor.data`: if a Parameter gets other data during the save, this memory stays alive.
        source = TensorSource(tensor.data if tensor.requires_grad else tensor, tensor.dtype)
        self.entries.append(Entry(name, "tensor", None, None, source))
        return name

    def usual_tensors(self, tensors: Sequence[torch.Tensor], names: Iterable[str]) -> list[str] | None:
        """What `tensor` returns for each of ``tensors``, in half the time; None, and nothing is stored, if more has to be known."""
        names = [self._prefix + name for name in names]
        if not all_usual(tensors) or any(tensor.requires_grad for tensor in tensors):
            return None
        found = dict(zip(map(torch.Tensor.data_ptr, tensors), zip(names, tensors)))
        if len(found) < len(tensors) or not found.keys().isdisjoint(self._first_at):
            return None
        if len({*names}) < len(names) or not self._names.isdisjoint(names):
            return None
        if not self._prefix and any(map(belongs_to_rank, names)):
            return None
        self._first_at.update(found)
        self._names.update(names)
        rows = zip(names, tensors)
        self.entries += [Entry(name, "tensor", None, None, TensorSource(tensor, tensor.dtype)) for name, tensor in rows]
        return names

    def _take(self, name: str) -> str:
        """``name``, or one like it if it is taken or looks like that of a rank."""
        if name in self._names or (not self._prefix and belongs_to_rank(name)):
            name = self._free(name)
        self._names.add(name)
        return name

    def _free(self, name: str) -> str:
        number = 2
        while f"shared/{name} ({number})" in self._names:
            number += 1
        return f"shared/{name} ({number})"

    def _tensor_value(self, tensor: torch.Tensor, place: Place) -> Any:
        if type(tensor) not in PLAIN_TYPES and is_distributed(tensor):
            return self._distributed_value(tensor, place)
        if type(tensor) not in PLAIN_TYPES and hasattr(tensor, "__tensor_flatten__"):
            return write_subclass(tensor, place, self.value)
        value = {"tensor": self.tensor(tensor, place.name, place.path)}
        return value if tensor.is_cpu else {**value, "on": tensor.device.type}

    def _distributed_value(self, tensor: torch.Tensor, place: Place) -> Any:
        if self._parts is None:
            refuse_alone(place, tensor)
        part = part_of(tensor, place, self._parts)
        # A part without elements has no memory by which ties could be found, so the object itself counts too.
        memory = (memory_key(part.local), part.spread.layout) if part.local.numel() else id(tensor)
        known = self._distributed.get(id(tensor)) or self._distributed.get(memory)
        if known is None:
            self.has_distributed = True
            known = tensor, (self._own_boxes if self._prefix else self._shared_boxes)(tensor, part, place)
        self._distributed[id(tensor)] = self._distributed[memory] = known
        return known[1]

    def _shared_boxes(self, tensor: torch.Tensor, part: LocalPart, place: Place) -> Any:
        """The value of a tensor of which other ranks have the other boxes."""
        name = self._take(place.name)
        self.entries.append(Entry(name, "tensor", None, None, part.spread))
        value = {"tensor": name, "placements": placements_in_words(tensor)}
        return value if tensor.is_cpu else {**value, "on": tensor.device.type}

    def _own_boxes(self, tensor: torch.Tensor, part: LocalPart, place: Place) -> Any:
        """The value of a tensor that belongs to this rank, of which it has only these boxes."""
        chunks = part.spread.local
        names = [self.tensor(chunk.tensor, f"{place.name}/{at}", place.path) for at, chunk in enumerate(chunks)]
        return {
            BOXES: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "placements": placements_in_words(tensor),
                "parts": [[list(chunk.begin), name] for chunk, name in zip(chunks, names)],
            }
        }

    def _container(self, value: Any, place: Place) -> Any:
        if id(value) in self._above:
            refuse(place, "values that do not contain themselves were", f"this {type(value).__name__} does")
        if len(self._above) == MAX_DEPTH:
            refuse(place, f"values nested at most {MAX_DEPTH} levels deep were", "it is deeper")
        self._above.append(id(value))
        try:
            if isinstance(value, dict):
                return self._dict(value, place)
            if isinstance(value, set):
                keys = [self._key(element, place) for element in value]
                return {"set": sorted(keys, key=json.dumps)}
            if type(value) is torch.Size:
                return {"size": list(value)}
            if type(value) not in (list, tuple):
                refuse_value(place, value)
            return {type(value).__name__: self._items(value, place)}
        finally:
            self._above.pop()

    def _items(self, values: Iterable[Any], place: Place) -> list[Any]:
        scalar = (bool, type(None))
        return [item if type(item) in scalar else self.value(item, place.at(at)) for at, item in enumerate(values)]

    def _dict(self, value: dict[Any, Any], place: Place) -> Any:
        if all(type(key) is str for key in value):
            return {"dict": {_text(key, place): self.value(item, place.at(key)) for key, item in value.items()}}
        return {"pairs": [[self._key(key, place), self.value(item, place.at(key))] for key, item in value.items()]}

    def _key(self, key: Any, place: Place) -> Any:
        if type(key) not in _KEYS:
            refuse(
                place, "keys and elements that are numbers, text or tuples of these were", f"one is {an(type(key).__name__)}"
            )
        if type(key) is tuple:
            for part in key:
                self._key(part, place)
        return self.value(key, place)

    def _other(self, value: Any, place: Place) -> Any:
        kind = type(value)
        if isinstance(value, np.ndarray):
            if is_swapped(value):
                refuse(place, "an array in the byte order of this processor was", f"its dtype is {value.dtype}")
            return {"array": self.tensor(tensor_of_array(place.path, value), place.name, place.path)}
        if isinstance(value, np.generic) and value.dtype.name in SCALARS:
            return {"scalar": [value.dtype.name, self.value(value.item(), place)]}
        if kind is complex:
            return {"complex": [self.value(value.real, place), self.value(value.imag, place)]}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        refuse_value(place, value)


def _text(text: str, place: Place) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            refuse(place, "text in Unicode was", "it has half of a surrogate pair")
    return text
