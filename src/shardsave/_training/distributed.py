"""Tensors in a training state of which several ranks have parts: how they are written, and how those that take them are made or found."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn, Protocol

import torch

from shardsave._common.memory import memory_key
from shardsave._common.strict_json import glimpse
from shardsave._common.words import an
from shardsave._format.dtypes import BY_NAME, BY_TORCH
from shardsave._state.distributed_tensors import LocalPart, NotReadable, PartReader, is_distributed, is_dtensor
from shardsave._state.savable import check_savable
from shardsave._training.places import Place
from shardsave.errors import IncompatibleCheckpointError, UnsupportedTensorError

#: The tag of a distributed tensor that belongs to a rank: only the boxes of this rank are stored.
TAG = "boxes"

_SHARD = re.compile(r"shard (\d{1,2})")
_REPLICATE, _OTHER = "replicate", "other"

#: More dimensions than any mesh has, and a deeper nesting than any state has.
_MAX_PLACEMENTS, _MAX_DEPTH = 32, 64


class Reader(Protocol):
    """What a reader of values does for distributed tensors; `ValueReader` is the one."""

    where: str
    parts: PartReader | None

    def corrupt(self, path: str, expected: str, found: object) -> NoReturn: ...

    def members(self, value: Any, path: str, kinds: Mapping[str, type]) -> list[Any]: ...

    def value(self, value: Any, path: str, onto: Any = None) -> Any: ...

    def stored(self, name: Any, path: str) -> Any: ...

    def fill(self, name: Any, tensor: torch.Tensor, path: str) -> bool: ...

    def read_into(self, name: str, tensor: torch.Tensor) -> None: ...


def part_of(tensor: torch.Tensor, place: Place, parts: PartReader) -> LocalPart:
    """The part of ``tensor`` in this process, to be saved. Raises UnsupportedTensorError if its elements cannot be located."""
    try:
        part = parts.read(tensor)
    except NotReadable as error:
        _refuse(place, error.expected, error.found)
    check_savable(place.path, part.local)
    if BY_TORCH[tensor.dtype].bits < 8:
        _refuse(place, "elements of whole bytes were expected", f"its dtype is {tensor.dtype}")
    return part


def refuse_alone(place: Place, tensor: torch.Tensor) -> NoReturn:
    """Refuses a distributed tensor in a save that other ranks take no part in."""
    _refuse(
        place,
        "a tensor that is whole in this process was expected",
        f"it is {an(type(tensor).__name__)}, of which other ranks have parts: pass process_group= on all of them",
    )


def _refuse(place: Place, expected: str, found: str) -> NoReturn:
    raise UnsupportedTensorError(f"cannot save {place.path}: {expected}, {found}; nothing was written")


def placements_in_words(tensor: Any) -> list[str]:
    """How ``tensor`` is placed along each dimension of its mesh: ``shard 0``, ``replicate`` or ``other``; nothing if it has no mesh."""
    return [_in_words(placement) for placement in tensor.placements] if is_dtensor(tensor) else []


def _in_words(placement: Any) -> str:
    kind = type(placement).__name__
    return {"Replicate": _REPLICATE, "Shard": f"shard {getattr(placement, 'dim', 0)}"}.get(kind, _OTHER)


def are_placements(value: Any) -> bool:
    """Whether ``value``, from a document, can be what `placements_in_words` returned."""
    return (
        type(value) is list
        and len(value) <= _MAX_PLACEMENTS
        and all(type(word) is str and (word in (_REPLICATE, _OTHER) or _SHARD.fullmatch(word)) for word in value)
    )


def new_distributed(like: Any, shape: tuple[int, ...], dtype: torch.dtype, placed: list[str]) -> torch.Tensor:
    """A new tensor on the mesh of ``like``, a DTensor, without communication.

    It is placed as ``like`` if that has the same ``shape``; else as it was ``placed``, if that fits; else each rank has all of it.
    """
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    from torch.distributed.tensor import Replicate, Shard, empty

    mesh = like.device_mesh
    matches = [_SHARD.fullmatch(word) for word in placed] if len(placed) == mesh.ndim else [None] * mesh.ndim
    dims = [int(match[1]) if match is not None else -1 for match in matches]
    placements = [Shard(dim) if 0 <= dim < len(shape) else Replicate() for dim in dims]
    made: torch.Tensor = empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
    return made if made.device == like.device else made.to(like.device)


def part_to_fill(path: str, tensor: torch.Tensor, parts: PartReader) -> LocalPart:
    """The part of ``tensor`` in this process, to be filled. Raises UnsupportedTensorError if its elements cannot be located."""
    try:
        return parts.read(tensor)
    except NotReadable as error:
        raise UnsupportedTensorError(f"cannot fill {path}: {error.expected}, {error.found}; nothing was changed") from None


def existing_part(path: str, tensor: torch.Tensor, parts: PartReader) -> tuple[torch.Tensor, Hashable]:
    """The memory of a distributed tensor that is to be filled, and what is equal for the same memory. Raises UnsupportedTensorError."""
    local = part_to_fill(path, tensor, parts).local
    return local, memory_key(local) if local.numel() else id(tensor)


def read_boxes(content: Any, path: str, reader: Reader, like: torch.Tensor | None) -> torch.Tensor:
    """A new tensor for what follows the tag; its boxes are read from disk. ``like``: a live tensor beside which it is made."""
    shape, dtype, placements, _ = reader.members(content, path, _MEMBERS)
    if not is_dtensor(like) or reader.parts is None:
        _differs(path, reader, "a distributed tensor was saved, here none is")
    if not are_placements(placements) or not all(type(size) is int and 0 <= size < 1 << 60 for size in shape):
        reader.corrupt(path, "a shape and placements were", shape)
    made_dtype = reader.value({"dtype": dtype}, path)
    try:
        made = new_distributed(like, tuple(shape), made_dtype, placements)
    except (MemoryError, RuntimeError, OverflowError, TypeError, ValueError):  # the shape may be anything
        reader.corrupt(path, f"the shape of a tensor of {glimpse(dtype)} was", shape)
    _match(content, made, path, reader, reader.read_into)
    return made


def fill_boxes(live: torch.Tensor, content: Any, path: str, reader: Reader) -> str | None:
    """Has the boxes of ``live`` read from disk. Returns how it differs from what is stored, in words; then it is left as it is."""
    shape, dtype, _, _ = reader.members(content, path, _MEMBERS)
    if reader.parts is None or not is_distributed(live):
        return f"{path}: the checkpoint has a distributed tensor, here is {an(type(live).__name__)}"
    if list(live.shape) != shape or str(live.dtype) != f"torch.{dtype}":
        return f"{path}: it is {glimpse(shape)} of {glimpse(dtype)} on disk, {list(live.shape)} of {live.dtype} here"
    _match(content, live, path, reader, lambda name, tensor: reader.fill(name, tensor, path))
    return None


_MEMBERS = {"shape": list, "dtype": str, "placements": list, "parts": list}


def _match(content: Any, tensor: torch.Tensor, path: str, reader: Reader, read: Callable[[str, torch.Tensor], object]) -> None:
    """Calls ``read`` with the name of each stored box and its elements in ``tensor``, which must be distributed as it was."""
    parts = content["parts"]
    if not all(type(part) is list and len(part) == 2 and type(part[0]) is list for part in parts):
        reader.corrupt(path, "boxes were", parts)
    assert reader.parts is not None
    chunks = part_to_fill(path, tensor, reader.parts).spread.local
    stored = [(begin, list(reader.stored(name, path).shape)) for begin, name in parts]
    if stored != [(list(chunk.begin), list(chunk.tensor.shape)) for chunk in chunks]:
        _differs(path, reader, "it was distributed in another way than here")
    for (_, name), chunk in zip(parts, chunks):
        if BY_NAME[reader.stored(name, path).dtype].torch != tensor.dtype:
            reader.corrupt(path, f"boxes of {tensor.dtype} were", name)
        read(name, chunk.tensor)


def _differs(path: str, reader: Reader, difference: str) -> NoReturn:
    raise IncompatibleCheckpointError(
        f"cannot resume from {reader.where}: {path}: a tensor that is distributed as it was saved was expected, since it belongs to a "
        f"rank, {difference}; nothing was changed"
    )


def has_distributed(saved: Any) -> bool:
    """Whether there is a distributed tensor in ``saved``, a value of a document."""
    waiting = [saved]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if TAG in value or "placements" in value:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def distributed_in(value: Any, path: str) -> dict[str, torch.Tensor]:
    """Path → distributed tensor, for all in the containers of ``value``, which a `state_dict()` returned."""
    found: dict[str, torch.Tensor] = {}
    waiting = [(path, value, 0)]
    while waiting:
        at, item, depth = waiting.pop()
        if isinstance(item, torch.Tensor):
            if is_dtensor(item):
                found[at] = item
        elif isinstance(item, (Mapping, list, tuple)) and depth < _MAX_DEPTH:
            items = item.items() if isinstance(item, Mapping) else enumerate(item)
            waiting += [(f"{at}[{glimpse(key)}]", inner, depth + 1) for key, inner in items]
    return found
