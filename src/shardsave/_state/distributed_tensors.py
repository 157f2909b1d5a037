"""Tensors of which each process holds a part, as torch's DTensor does: which rank holds which elements, and what this process has.

Nothing is imported for them: whoever has a DTensor has imported its class.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from shardsave._common.assembled import Chunk
from shardsave._common.layouts import Extent, Grid, Listed, Placed, Split, Whole
from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.spread import Spread, local_chunks
from shardsave._common.words import an

#: The method by which a distributed checkpoint asks a tensor, or the local part of a DTensor, for its boxes.
_CHUNK_LIST = "__create_chunk_list__"
#: In the place of the function that torch asks for each attribute: the class does not want to be asked.
_NOT_ASKED = torch._C._disabled_torch_function_impl
#: The attributes of a Parameter that is a DTensor.
_OF_TORCH = frozenset(["_local_tensor", "_spec", "_is_param"])


class NotReadable(Exception):
    """A distributed tensor whose elements cannot be located. ``expected`` and ``found`` complete a message."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


class LocalPart(NamedTuple):
    """The part of a distributed tensor in this process. ``local``: the tensor that has all elements of ``spread`` that are here."""

    spread: Spread
    local: torch.Tensor


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor of torch."""
    kind: Any = type(value)
    return kind not in PLAIN_TYPES and _is_dtensor_class(kind)


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, or another tensor that tells distributed checkpoints which boxes this process has."""
    return type(tensor) not in PLAIN_TYPES and is_distributed_class(type(tensor))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` in this process: ``tensor`` itself, unless it is a DTensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a plain or a distributed tensor is a Parameter."""
    kind: Any = type(tensor)
    # torch marks Parameters of other classes with this attribute; `isinstance` looks for it too, but ten times more slowly.
    return kind is nn.Parameter or (
        kind not in PLAIN_TYPES and is_distributed_class(kind) and getattr(tensor, "_is_param", False)
    )


@lru_cache(maxsize=256)
def _is_dtensor_class(kind: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


@lru_cache(maxsize=256)
def is_distributed_class(kind: Any) -> bool:
    """Whether tensors of the class ``kind`` are distributed."""
    return _is_dtensor_class(kind) or hasattr(kind, _CHUNK_LIST)


def attributes_of(parameter: torch.Tensor) -> dict[str, Any]:
    """The attributes that somebody has set on a plain or a distributed Parameter, without those that torch itself needs."""
    own = dict(vars(parameter))
    if is_distributed(parameter):
        own = {name: value for name, value in own.items() if name not in _OF_TORCH}
    return own


def are_parameters(tensors: Collection[torch.Tensor]) -> list[bool]:
    """`is_parameter` of each of ``tensors``, in less time."""
    distributed = {kind for kind in {*map(type, tensors)} if kind not in PLAIN_TYPES and is_distributed_class(kind)}
    return [
        getattr(tensor, "_is_param", False) if type(tensor) in distributed else type(tensor) is nn.Parameter
        for tensor in tensors
    ]


def read_directly(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[object]:
    """A block in which torch reads attributes of ``tensors`` without looking each time whether their class wants to be asked, which takes
    three times as long for classes such as DTensor. Nothing changes for a class that does not want that, or if one of them does.
    """
    kinds = {*map(type, tensors)} - PLAIN_TYPES
    ask_nothing = all(getattr(kind, "__torch_function__", None) is _NOT_ASKED for kind in kinds)
    return torch._C.DisableTorchFunctionSubclass() if ask_nothing else nullcontext()


class _Held(NamedTuple):
    """What one rank has of a tensor: the shape of its local tensor, and where each of its boxes begins."""

    layout: Placed
    sizes: tuple[int, ...]
    begins: Sequence[tuple[int, ...]]


class PartReader:
    """Reads distributed tensors in one process of a group.

    ``members``: the global rank of each process of the group. ``rank``: the position of this process among them.
    """

    def __init__(self, members: Sequence[int], rank: int) -> None:
        self.rank = rank
        self._position = {member: position for position, member in enumerate(members)}
        self._grids: dict[int, tuple[Any, Grid]] = {}
        self._held: dict[Any, _Held] = {}
        self._of_specs: dict[Any, tuple[_Held, Any]] = {}  # with the spec, whose identity is a part of the key

    def read(self, tensor: torch.Tensor) -> LocalPart:
        """The part of ``tensor``, which `is_distributed`, in this process. Raises NotReadable."""
        if not is_dtensor(tensor):
            return self._listed(tensor, getattr(tensor, _CHUNK_LIST), _local_of(tensor))
        local = tensor._local_tensor  # type: ignore[attr-defined]
        if type(local) not in PLAIN_TYPES:
            local = _waited(local)
        if hasattr(local, _CHUNK_LIST):  # Megatron-FSDP gives its uneven parts one; DTensor's own answer then is theirs
            return self._listed(tensor, getattr(local, _CHUNK_LIST), local)
        held = self._held_of(tensor._spec, tensor.shape)  # type: ignore[attr-defined]
        if type(local) not in PLAIN_TYPES:
            raise NotReadable("a DTensor of plain tensors was expected", f"its local tensor is {an(type(local).__name__)}")
        try:
            # `Tensor.data`: if the parameter gets other data during the save, this memory stays alive.
            return LocalPart(self._spread(tensor.dtype, held, local.data), local)
        except ValueError as error:
            raise NotReadable(f"a local tensor as {tensor.placements} says was expected", str(error)) from None  # type: ignore[attr-defined]

    def read_all(self, tensors: Sequence[Any]) -> tuple[list[torch.Tensor], list[Spread]] | None:
        """What `read` returns for each of ``tensors``, column by column and in less time: tensors with the memory of the local ones, and
        the spread ones.

        None if `read` has more to look at, or one of them cannot be read.
        """
        if not all(map(_is_dtensor_class, {*map(type, tensors)})):
            return None
        local = [tensor._local_tensor for tensor in tensors]
        if not PLAIN_TYPES.issuperset(map(type, local)) or any(map(hasattr, local, repeat(_CHUNK_LIST))):
            return None
        with read_directly(tensors):
            dtypes = [*map(attrgetter("dtype"), tensors)]
            shapes = [*map(attrgetter("shape"), tensors)]
        specs = [tensor._spec for tensor in tensors]
        keys = [*zip(map(id, specs), shapes)]
        data = [part.data for part in local]
        try:
            held = {key: self._held_of(spec, key[1]) for key, spec in dict(zip(keys, specs)).items()}
            return data, [self._spread(dtype, held[key], part) for dtype, key, part in zip(dtypes, keys, data)]
        except (NotReadable, ValueError):
            return None

    def _spread(self, dtype: torch.dtype, held: _Held, data: torch.Tensor) -> Spread:
        """A tensor of which this process has ``held`` in the plain tensor ``data``. Raises ValueError for another shape than is held."""
        layout, sizes, begins = held
        if len(begins) == 1 and data.shape == sizes:  # nearly all tensors
            return Spread(dtype, layout, (Chunk(begins[0], data),))
        return Spread(dtype, layout, local_chunks(layout, self.rank, data))

    def replicated(self, tensor: torch.Tensor) -> Spread:
        """``tensor``, which each process of the group has as a whole."""
        layout = Whole(range(len(self._position)), tuple(tensor.shape))
        return Spread(tensor.dtype, layout, [Chunk((0,) * tensor.dim(), tensor)] if tensor.numel() else [])

    def _held_of(self, spec: Any, shape: torch.Size) -> _Held:
        """What this process has of a DTensor. torch gives one spec to many tensors, and its identity is found at once."""
        known = self._of_specs.get((id(spec), shape))
        if known is None:
            key = id(spec.mesh), spec.placements, shape
            held = self._held.get(key)
            if held is None:
                layout = Placed(self._grid(spec.mesh), [_split(placement, len(shape)) for placement in spec.placements], shape)
                sizes, inside = layout.local(self.rank)
                held = self._held[key] = _Held(layout, sizes, [part.begin for part in inside])
            known = self._of_specs[id(spec), shape] = held, spec
        return known[0]

    def _grid(self, mesh: Any) -> Grid:
        found = self._grids.get(id(mesh))
        if found is None:
            ranks = [self._position.get(rank, -1) for rank in mesh.mesh.flatten().tolist()]
            found = self._grids[id(mesh)] = (mesh, Grid(ranks, tuple(mesh.mesh.shape)))
        return found[1]

    def _listed(self, tensor: torch.Tensor, chunk_list: Callable[[], Any], local: torch.Tensor) -> LocalPart:
        boxes: list[Extent] = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunk_list()]
        layout = Listed({self.rank: [box for box in boxes if 0 not in box[1]]}, tensor.shape)
        return LocalPart(Spread(tensor.dtype, layout, _pieces(local.data, layout.boxes(self.rank))), local)


def _split(placement: Any, dims: int) -> Split:
    kind = type(placement).__name__
    if kind == "Replicate":
        return Split(-1)
    if kind == "Shard":
        return Split(placement.dim % dims)
    if kind == "_StridedShard":
        return Split(placement.dim % dims, int(placement.split_factor))
    if placement.is_partial():
        raise NotReadable(
            "a tensor of which each rank has a part or a copy was expected",
            f"it is {placement!r}: the ranks have summands; use tensor.redistribute() with Shard or Replicate placements",
        )
    raise NotReadable("placements Shard or Replicate were expected", f"one is {placement!r}")


def _pieces(local: torch.Tensor, boxes: Sequence[Extent]) -> tuple[Chunk, ...]:
    """``local`` as ``boxes``, whose elements follow one another in it."""
    if len(boxes) == 1 and tuple(local.shape) == boxes[0][1]:
        return (Chunk(boxes[0][0], local),)
    sizes = [math.prod(box[1]) for box in boxes]
    if sum(sizes) != local.numel() or not local.is_contiguous():
        expected = f"a local tensor of {sum(sizes)} elements in a row was expected, for its {len(boxes)} boxes"
        raise NotReadable(expected, f"it has shape {list(local.shape)} and strides {list(local.stride())}")
    ends = itertools.accumulate(sizes)
    return tuple(
        Chunk(begin, local.view(-1)[end - size : end].view(shape)) for (begin, shape), size, end in zip(boxes, sizes, ends)
    )


def _local_of(tensor: Any) -> torch.Tensor:
    with torch.no_grad():
        local = tensor.to_local() if hasattr(tensor, "to_local") else None
    if local is None or type(local) not in PLAIN_TYPES:
        raise NotReadable("a tensor whose to_local() is a plain tensor was expected", f"it is {an(type(tensor).__name__)}")
    return local  # type: ignore[no-any-return]


def _waited(local: Any) -> torch.Tensor:
    """``local``, or the tensor that it becomes: torch returns results of collectives before these have ended."""
    return local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local  # type: ignore[no-any-return]


def tied_parts(named: Mapping[str, torch.Tensor], parts: Mapping[str, Spread], ties: Mapping[str, str]) -> dict[str, str]:
    """``ties`` (name → the first name with the same memory here) as those of the whole tensors.

    Two names of one Parameter are tied even if this process has no element of it. Parts in one memory that belong to different boxes, or
    to wholes of different shapes, are not.
    """
    tied = {
        name: first
        for name, first in ties.items()
        if name not in parts or (first in parts and parts[first].layout == parts[name].layout)
    }
    if len({id(named[name]) for name in parts}) == len(parts):
        return tied
    first_of: dict[int, str] = {}
    for name, part in parts.items():
        if (first := first_of.setdefault(id(named[name]), name)) != name and part.nbytes:
            tied.setdefault(name, tied.get(first, first))
    return tied
