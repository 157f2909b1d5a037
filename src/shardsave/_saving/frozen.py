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
from shardsave._common.sources import ByteSource, TensorSource
from shardsave._common.spread import Spread
from shardsave._state.distributed_tensors import local_tensor
from shardsave._state.module import Entry


class FrozenMemory(NamedTuple):
    """The memory of a frozen parameter at one moment. ``key`` differs for another dtype in the file, and for another part of a tensor.
    ``storage`` keeps no memory alive, but as long as it exists, no other storage has its number (``cdata``)."""

    key: Hashable
    parameter: int
    version: Hashable
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
    """Name on disk → the memory of the frozen parameter whose elements it has; ``parameters``: those to which that may apply.

    Of a tensor of several ranks, it is the memory of the only box that this one has.
    """
    owners = {
        memory_key(local): (local, parameter)
        for parameter in parameters
        if not parameter.requires_grad
        for local in [local_tensor(parameter)]
    }
    found = {}
    for entry in entries:
        stored = _memory_of(entry.source) if entry.frozen else None
        if stored is None:
            continue
        tensor, place = stored
        key = memory_key(tensor)
        local, owner = owners.get(key, (None, None))
        if local is not None and owner is not None and not (local.is_inference() or owner.is_inference()):
            storage = StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]
            version = local._version, owner._version
            found[entry.name] = FrozenMemory((key, entry.source.dtype, place), id(owner), version, storage)
    return found


def _memory_of(source: ByteSource) -> tuple[torch.Tensor, Hashable] | None:
    """The memory that ``source`` stores, and which part of which tensor it is."""
    if type(source) is TensorSource:
        return source.tensor, None
    if type(source) is Spread and len(source.local) == 1:
        begin, tensor = source.local[0]
        return tensor, (source.layout, begin)
    return None


def sum_when_saved(memory: FrozenMemory) -> int | None:
    """The checksum with which the same parameter was last saved; None if it was not, or has changed since."""
    saved, checksum = _saved.get(memory.key, (None, 0))
    return checksum if saved is not None and saved.is_same(memory) else None


def remember(memories: Mapping[str, FrozenMemory], sums: Mapping[str, int]) -> None:
    """Notes the checksums (name → checksum) with which parameters were just saved, and forgets those that do not exist any more."""
    for key in [key for key, (saved, _) in _saved.items() if saved.is_gone]:
        _saved.pop(key, None)
    _saved.update({memory.key: (memory, sums[name]) for name, memory in memories.items() if name in sums})
