"""Reads values of a training document as Python values, and decides which stored tensor is read into which tensor.

A document may come from anywhere, so nothing in it is believed: whatever has another form raises CorruptCheckpointError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from shardsave._common.memory import PLAIN_TYPES, any_overlap, lacks_memory, memory_key, reach
from shardsave._common.memory_errors import refuse_lack_of_memory
from shardsave._common.strict_json import glimpse
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._state.distributed_tensors import PartReader, is_distributed, is_dtensor
from shardsave._state.numpy_arrays import tensor_of_array
from shardsave._training.distributed import TAG as BOXES
from shardsave._training.distributed import are_placements, existing_part, new_distributed, read_boxes
from shardsave._training.scalars import DEVICE, READERS
from shardsave._training.subclasses import TAG as SUBCLASS
from shardsave._training.subclasses import read_subclass
from shardsave._training.write_values import MAX_DEPTH
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError, UnsupportedTensorError

#: The most keys of one mapping that may have the same hash; with more, a mapping takes very long to build.
_MAX_KEYS_PER_HASH = 8

_CPU = torch.device("cpu")

#: The keys of the value of a tensor.
_TENSOR = {"tensor", "on", "placements"}

UNCHANGED = "nothing was changed"


class Stored(Protocol):
    """A stored tensor, by the names of its dtype and the shape in the header of its file."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


class Onto(NamedTuple):
    """Where new tensors are made: on ``device``, with the strides of ``like`` if they have its shape."""

    device: torch.device
    like: torch.Tensor | None = None


class ValueReader:
    """Reads values. ``targets``: stored name → the tensor to read it into. ``copies``: (tensor, the tensor of ``targets`` to copy into it).
    ``distributed``: (stored name, a tensor of which this process fills its part), each of which is read for itself. ``existing``: the
    `id` of all of these that are not new → its memory. ``in_place``: (path, memory of an existing tensor).

    New tensors are made at once and filled later. Existing tensors are only noted.
    """

    def __init__(
        self, tensors: Mapping[str, Stored], where: str, parts: PartReader | None = None, *, has_placements: bool = False
    ) -> None:
        """``parts``: reads distributed tensors; None if this process alone reads. ``has_placements``: whether the documents say which
        tensors were distributed."""
        self.targets: dict[str, torch.Tensor] = {}
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.distributed: list[tuple[str, torch.Tensor]] = []
        self.existing: dict[int, torch.Tensor] = {}
        self.in_place: list[tuple[str, torch.Tensor]] = []
        self.where = where
        self._tensors = tensors
        self.parts = parts
        self._has_placements = has_placements
        self._depth = 0
        self._new: dict[Hashable, torch.Tensor] = {}
        self._filled: set[Hashable] = set()
        self._likes: Mapping[str, torch.Tensor] = {}

    def corrupt(self, path: str, expected: str, found: object) -> NoReturn:
        raise CorruptCheckpointError(
            f"corrupt training state in {self.where}: {path}: {expected} expected, it is {glimpse(found)}; {UNCHANGED}"
        )

    def begin_leaf(self, likes: Mapping[str, torch.Tensor] | None = None) -> None:
        """From now on, a stored tensor that was read before becomes another new tensor: leaves never share memory.

        ``likes``: path → the distributed tensor of the live leaf to which a new one there is made alike.
        """
        self._new = {}
        self._likes = likes or {}

    def members(self, value: Any, path: str, kinds: Mapping[str, type]) -> list[Any]:
        """The members ``kinds`` (name → type) of the JSON object ``value``."""
        if type(value) is not dict or not value.keys() >= kinds.keys():
            self.corrupt(path, f"an object with {', '.join(kinds)} was", value)
        for name, kind in kinds.items():
            if kind is not object and type(value[name]) is not kind:
                self.corrupt(f"{path}, {name}", f"a JSON {kind.__name__} was", value[name])
        return [value[name] for name in kinds]

    def value(self, value: Any, path: str, onto: Onto | None = None) -> Any:
        """The Python value of ``value``. ``onto``: where tensors go; by default to a device of the kind on which they were."""
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        tag = next(iter(value), "") if kind is dict else ""
        if kind is not dict or not (len(value) == 1 or (tag == "tensor" and value.keys() <= _TENSOR)):
            self.corrupt(path, "a value was", value)
        if self._depth > 2 * MAX_DEPTH:
            self.corrupt(path, f"values nested at most {MAX_DEPTH} levels deep were", value)
        self._depth += 1
        try:
            if tag == "tensor":
                if not are_placements(placed := value.get("placements", [])):
                    self.corrupt(path, "placements were", placed)
                onto = onto or Onto(self._device_of_kind(value.get("on"), path), self._likes.get(path))
                return self.new(value[tag], path, onto, placed)
            if tag in ("dict", "pairs", "list", "tuple", "set"):
                return self._container(tag, value[tag], path, onto)
            if tag == "array":
                return self._new_array(value[tag], path)
            if tag == BOXES:
                return read_boxes(value[tag], path, self, onto.like if onto is not None else self._likes.get(path))
            if tag == SUBCLASS:
                return read_subclass(value[tag], path, self, onto and onto._replace(like=None))
            if (read := READERS.get(tag)) is None:
                self._unknown(tag, path, value)
            try:
                return read(value[tag])
            except (ValueError, TypeError, OverflowError, KeyError, AttributeError, RuntimeError):
                self.corrupt(path, f"a value of the kind {tag!r} was", value[tag])
        finally:
            self._depth -= 1

    def new(self, name: Any, path: str, onto: Onto, placed: list[str] | None = None) -> torch.Tensor:
        """A new tensor for the stored tensor ``name``; within a leaf always the same one. ``placed``: how it was distributed."""
        if torch.is_inference_mode_enabled():  # a tensor that was made in the caller's inference mode could never be trained
            with torch.inference_mode(False):
                return self.new(name, path, onto, placed)
        stored = self.stored(name, path)
        dtype, shape = BY_NAME[stored.dtype].torch, torch_shape(stored.dtype, stored.shape)
        spread = self._is_spread(onto.like, shape, placed)
        key = (name, onto.device, id(onto.like) if spread else None)
        if (made := self._new.get(key)) is not None:
            return made
        try:
            if spread:
                made = new_distributed(onto.like, shape, dtype, placed or [])
            elif onto.like is not None and onto.like.shape == shape and not is_dtensor(onto.like):
                made = torch.empty_like(onto.like, dtype=dtype, device=onto.device, requires_grad=False)
            else:
                made = torch.empty(shape, dtype=dtype, device=onto.device)
        except (MemoryError, RuntimeError) as error:
            refuse_lack_of_memory(error, name, stored.nbytes, onto.device)
            raise
        self._new[key] = made
        if spread:
            self.distributed.append((name, made))
        else:
            self.read_into(name, made)
        return made

    def _is_spread(self, like: torch.Tensor | None, shape: tuple[int, ...], placed: list[str] | None) -> bool:
        """Whether a new tensor beside ``like`` is distributed as that is: if it was, or if one process saved it and nobody knows."""
        if like is None or not is_dtensor(like):
            return False
        return bool(placed) or (not self._has_placements and (like.shape == shape or len(shape) > 0))

    def fill(self, name: Any, tensor: torch.Tensor, path: str) -> bool:
        """Has the stored tensor ``name`` read into the existing ``tensor`` of the same shape. Returns whether it is cast."""
        stored = self.stored(name, path)
        dtype = BY_NAME[stored.dtype].torch
        destination = tensor.detach()
        if self.parts is not None and is_distributed(tensor):
            memory, key = existing_part(path, destination, self.parts)
            check_fillable(path, memory)
            if (name, key) not in self._filled:
                self.distributed.append((name, destination))
                self._note_existing(path, destination, memory)
        else:
            check_fillable(path, tensor)
            key = memory_key(destination)
            if (name, key) not in self._filled:
                self._note_existing(path, destination, destination)
                self.read_into(name, destination)
        self._filled.add((name, key))
        return dtype != tensor.dtype

    def _note_existing(self, path: str, tensor: torch.Tensor, memory: torch.Tensor) -> None:
        self.existing[id(tensor)] = memory
        self.in_place.append((path, memory))

    def stored(self, name: Any, path: str) -> Stored:
        """What is stored under ``name``."""
        if type(name) is not str or name not in self._tensors:
            self.corrupt(path, "the name of a stored tensor was", name)
        return self._tensors[name]

    def check_overlaps(self) -> None:
        """Raises UnsupportedTensorError if two existing tensors share memory and would be read from different bytes."""
        tensors = [(path, tensor) for path, tensor in self.in_place if tensor.nbytes]
        begins = [tensor.data_ptr() for _, tensor in tensors]
        ends = [begin + reach(tensor) for begin, (_, tensor) in zip(begins, tensors)]
        if not tensors or not any_overlap(begins, ends):
            return
        spans = sorted(zip((str(tensor.device) for _, tensor in tensors), begins, ends, (path for path, _ in tensors)))
        for (device, _, end, path), (other_device, begin, _, other) in pairwise(spans):
            if device == other_device and begin < end:
                raise UnsupportedTensorError(
                    f"cannot fill {other}: memory of its own was expected, it shares some with {path}, which is another stored "
                    f"tensor; {UNCHANGED}"
                )

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Has the stored tensor ``name`` read into a plain ``tensor`` of the same shape."""
        dtype = BY_NAME[self._tensors[name].dtype].torch
        first = self.targets.setdefault(name, tensor)
        if first is tensor:
            return
        if first.dtype != dtype == tensor.dtype:  # what is copied must be exact
            self.copies = [(to, tensor if source is first else source) for to, source in self.copies]
            self.targets[name], tensor = tensor, first
        self.copies.append((tensor, self.targets[name]))

    def _container(self, tag: str, content: Any, path: str, onto: Onto | None) -> Any:
        if tag == "dict" and type(content) is dict:
            return {key: self.value(item, f"{path}[{glimpse(key)}]", onto) for key, item in content.items()}
        if type(content) is not list or tag == "dict":
            self.corrupt(path, f"a value of the kind {tag!r} was", content)
        if tag == "pairs":
            return {key: self.value(item, f"{path}[{glimpse(key)}]", onto) for key, item in self.pairs(content, path)}
        if tag == "set":
            return set(self._keys(content, path))
        items = [self.value(item, f"{path}[{at}]", onto) for at, item in enumerate(content)]
        return items if tag == "list" else tuple(items)

    def pairs(self, content: Any, path: str) -> list[tuple[Any, Any]]:
        """(key, value that is not read yet) for what follows the tag ``pairs``."""
        if type(content) is not list or not all(type(pair) is list and len(pair) == 2 for pair in content):
            self.corrupt(path, "a list of pairs was", content)
        keys = self._keys([key for key, _ in content], path)
        return [(key, item) for key, (_, item) in zip(keys, content)]

    def _keys(self, content: list[Any], path: str) -> list[Any]:
        keys = [self.value(key, f"{path}, a key") for key in content]
        try:
            hashes = Counter(map(hash, keys))
        except TypeError:
            self.corrupt(path, "keys that can be hashed were", content)
        if max(hashes.values(), default=0) > _MAX_KEYS_PER_HASH or len(set(keys)) != len(keys):
            self.corrupt(path, "keys that are different were", content)
        return keys

    def _new_array(self, name: Any, path: str) -> np.ndarray[Any, Any]:
        torch_name = BY_NAME[self.stored(name, path).dtype].torch_name
        tensor = self.new(name, path, Onto(_CPU))
        try:
            dtype = np.dtype(torch_name)
        except TypeError:
            raise IncompatibleCheckpointError(
                f"cannot resume from {self.where}: {path}: a dtype of numpy was expected, it is {torch_name}; import ml_dtypes, "
                f"which adds it; {UNCHANGED}"
            ) from None
        return tensor.numpy() if dtype.kind in "biufc" else tensor.view(torch.uint8).numpy().view(dtype)

    def _device_of_kind(self, kind: Any, path: str) -> torch.device:
        """The current device of the kind on which a tensor was; the CPU if there is none."""
        if kind is None:
            return _CPU
        if type(kind) is not str or not DEVICE.fullmatch(kind):
            self.corrupt(path, "the kind of a device was", kind)
        current = torch.accelerator.current_accelerator(check_available=True)
        if current is None or current.type != kind:
            return _CPU
        return torch.device(kind, torch.accelerator.current_device_index())

    def _unknown(self, tag: str, path: str, value: Any) -> NoReturn:
        if tag in ("optimizer", "module", "object", "generator", "per_rank"):
            raise IncompatibleCheckpointError(
                f"cannot resume from {self.where}: {path}: plain data was expected, it is of the kind {tag!r}, which this version "
                f"does not read here; {UNCHANGED}"
            )
        self.corrupt(path, "a value was", value)


def check_fillable(path: str, tensor: torch.Tensor) -> None:
    """Raises UnsupportedTensorError if bytes cannot be read into ``tensor``, which exists already."""
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_nested:
        problem = f"it is of the class {type(tensor).__name__} and of the layout {tensor.layout}"
    elif tensor.is_meta:
        problem = "it is on the meta device"
    elif lacks_memory(tensor, reach(tensor)):
        problem = "its storage was freed or made smaller"
    elif any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride())):
        problem = "several of its elements share memory"
    else:
        return
    raise UnsupportedTensorError(
        f"cannot fill {path}: a plain tensor with memory of its own was expected, {problem}; {UNCHANGED}"
    )


def array_memory(path: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor in the memory of ``array``, to be filled. Raises UnsupportedTensorError."""
    if not array.flags.writeable or not array.dtype.isnative:
        raise UnsupportedTensorError(
            f"cannot fill {path}: an array that can be written, in the byte order of this processor, was expected; {UNCHANGED}"
        )
    return tensor_of_array(path, array)
