"""Remembers what frozen parameters had when they were saved, for saves that assume that these do not change.

A parameter is taken for the same if it is the same object with the same memory and the same version, which torch counts up with each
change that it knows of. It does not know of changes through ``.data``, numpy, a fused optimizer or a graph that is replayed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from shardsave._common.memory import memory_key
from shardsave._common.sources import TensorSource
from shardsave._state.module import Entry


class FrozenMemory(NamedTuple):
    """The memory of a frozen parameter at one moment. ``key`` differs for another dtype in the file. ``storage`` keeps no memory alive,
    but as long as it exists, no other storage has its number (``cdata``)."""

    key: Hashable
    parameter: int
    version: int
    storage: StorageWeakRef

    def is_same(self, other: FrozenMemory) -> bool:
        known = (self.key, self.parameter, self.version, self.storage.cdata)
        return known == (other.key, other.parameter, other.version, other.storage.cdata)

    @property
    def is_gone(self) -> bool:
        return bool(self.storage.expired())  # type: ignore[no-untyped-call]


#: `FrozenMemory.key` → what was saved, and its checksum in the file.
_saved: dict[Hashable, tuple[FrozenMemory, int]] = {}


def frozen_memory(entries: Iterable[Entry], parameters: Iterable[torch.nn.Parameter]) -> dict[str, FrozenMemory]:
    """Name on disk → the memory of the frozen parameter whose elements it has; ``parameters``: those to which that may apply."""
    owners = {memory_key(parameter): parameter for parameter in parameters if not parameter.requires_grad}
    found = {}
    for entry in entries:
        if type(entry.source) is not TensorSource or not entry.frozen:
            continue
        key = memory_key(entry.source.tensor)
        owner = owners.get(key)
        if owner is not None and not owner.is_inference():
            storage = StorageWeakRef(owner.untyped_storage())  # type: ignore[no-untyped-call]
            found[entry.name] = FrozenMemory((key, entry.source.dtype), id(owner), owner._version, storage)
    return found


def sum_when_saved(memory: FrozenMemory) -> int | None:
    """The checksum with which the same parameter was last saved; None if it was not, or has changed since."""
    saved, checksum = _saved.get(memory.key, (None, 0))
    return checksum if saved is not None and saved.is_same(memory) else None


def remember(memories: Mapping[str, FrozenMemory], sums: Mapping[str, int]) -> None:
    """Notes the checksums (name → checksum) with which parameters were just saved, and forgets those that do not exist any more."""
    for key in [key for key, (saved, _) in _saved.items() if saved.is_gone]:
        _saved.pop(key, None)
    _saved.update({memory.key: (memory, sums[name]) for name, memory in memories.items() if name in sums})
