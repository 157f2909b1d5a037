"""Tensors in a training state of which several ranks have parts: how they were placed, in words, and how a new one is made."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import torch

from shardsave._common.words import an
from shardsave._format.dtypes import BY_TORCH
from shardsave._state.distributed_tensors import NotReadable, Part, Parts, is_dtensor
from shardsave._state.savable import check_savable
from shardsave._training.places import Place
from shardsave.errors import UnsupportedTensorError

#: The tag of a distributed tensor that belongs to a rank: only the part of this rank is stored.
TAG = "boxes"

_SHARD = re.compile(r"shard (\d{1,2})")
_REPLICATE = "replicate"


def part_of(tensor: torch.Tensor, place: Place, parts: Parts) -> Part:
    """The part of ``tensor`` in this process. Raises UnsupportedTensorError if its elements cannot be located."""
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
    words = {"Replicate": lambda placement: _REPLICATE, "Shard": lambda placement: f"shard {placement.dim}"}
    placements = tensor.placements if is_dtensor(tensor) else ()
    return [words.get(type(placement).__name__, lambda placement: "other")(placement) for placement in placements]


def new_distributed(like: Any, shape: tuple[int, ...], dtype: torch.dtype, placed: list[str]) -> torch.Tensor:
    """A new tensor on the mesh of ``like``, a DTensor, without communication.

    It is placed as ``like`` if that has the same ``shape``; else as it was ``placed``, if that fits; else each rank has all of it.
    """
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    from torch.distributed.tensor import Replicate, Shard, empty

    mesh = like.device_mesh
    found = [_SHARD.fullmatch(word) for word in placed]
    fits = len(found) == mesh.ndim and all(match is None or int(match[1]) < len(shape) for match in found)
    placements = [Shard(int(match[1])) if fits and match is not None else Replicate() for match in found] if fits else []
    made = empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements or [Replicate()] * mesh.ndim)
    return made if made.device == like.device else made.to(like.device)

