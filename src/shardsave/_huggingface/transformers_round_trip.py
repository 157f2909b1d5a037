"""Whether a transformers model gets its tensors back from a layout on disk: some classes have a mapping that is not its own inverse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from shardsave._common.words import some
from shardsave._huggingface.transformers_names import NamesInMemory, converts
from shardsave._huggingface.transformers_on_disk import DiskTensor, reverted
from shardsave._loading.slots import Inventory
from shardsave.errors import UnsupportedTensorError


def not_given_back(
    model: Any, tensors: Mapping[str, torch.Tensor], leaders: Mapping[str, str], on_disk: Mapping[str, DiskTensor]
) -> list[str]:
    """The names of those of ``tensors`` that `from_pretrained` would not make again from ``on_disk``, which was made of them.

    ``tensors``: name in memory → tensor, each once. ``leaders``: every name in the state dict of ``model`` → the one of ``tensors``
    that it is. Names, shapes and which tensor is made of which are compared, values are not read.
    """
    if not converts():
        return []
    in_memory = NamesInMemory(model, tuple(leaders))
    members: dict[tuple[str, bool], list[tuple[str, str]]] = {}  # (name in memory, is converted) → (name on disk, pattern)
    for name, (first, pattern) in in_memory.of(on_disk):
        members.setdefault((first, bool(pattern)), []).append((name, pattern))
    right: set[str] = set()
    wrong: set[str] = set()
    for (first, _), parts in members.items():
        sources = {source for name, _ in parts for source in on_disk[name].sources}
        made = _made(in_memory, first, parts, [on_disk[name].tensor for name, _ in parts])
        targets = {leaders.get(name, name): tensor for name, tensor in made.items()}
        same = targets.keys() == sources and all(_alike(tensors[name], tensor) for name, tensor in targets.items())
        (right if same else wrong).update(targets)
    return [name for name in tensors if name in wrong or name not in right]


def exchange_notes(inventory: Inventory, stored: Collection[str]) -> tuple[str, ...]:
    """A note if `save_pretrained` gives tensors of the transformers model in ``inventory`` the names of others.

    ``stored``: the names in files that shardsave did not write.
    """
    if not converts():
        return ()
    leaders = {name: inventory.leader(name) for name in inventory.slots if name in inventory.expected}
    tensors = {first: inventory.slots[first].form for first in leaders.values()}
    try:
        on_disk = reverted(inventory.module, tensors)
    except (UnsupportedTensorError, NotImplementedError):  # this model could not be saved
        return ()
    lost = not_given_back(inventory.module, tensors, leaders, on_disk) if on_disk.keys() <= set(stored) else []
    if not lost:
        return ()
    return (
        f"{some(lost)} may have been exchanged when these files were written: transformers does not give them back from its own layout "
        f"of {type(inventory.module).__name__}; save the model with shardsave",
    )


def _made(
    in_memory: NamesInMemory, first: str, parts: list[tuple[str, str]], values: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What transformers makes of tensors like ``values``, by the names in memory; nothing if it cannot."""
    if not parts[0][1]:
        return {first: values[0]} if len(values) == 1 else {}
    try:
        return in_memory.convert(first, parts, [torch.empty(v.shape, dtype=v.dtype, device="meta") for v in values])
    except Exception:  # whatever transformers raises, the tensors do not come back
        return {}


def _alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype
