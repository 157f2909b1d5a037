"""Tensors that a whole model needs and its weights do not have."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from shardsave._common.memory import address, memory_key
from shardsave._common.sources import TensorSource
from shardsave._state.module import Entry
from shardsave._state.savable import check_savable


class ExtraTensors:
    """What a model needs and its weights (``entries``) do not have: non-persistent buffers, tensors in attributes, constants."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.kept: list[Entry] = []
        self._by_name = {entry.name: entry.tensor for entry in entries}
        named = reversed(self._by_name.items())  # of names with one memory the first is kept
        self._by_memory = {memory_key(tensor): name for name, tensor in named if address(tensor)}
        self._kept_by_memory: dict[Hashable, str] = {}
        self._taken = {"", "__metadata__"}

    def place(self, tensor: torch.Tensor, name: str) -> tuple[str, bool]:
        """The name under which the checkpoint has the data of ``tensor``, and whether it is an extra one."""
        memory = memory_key(tensor) if address(tensor) else None
        stored = self._by_memory.get(memory) if memory is not None else None
        if stored is None and memory is None and name in self._by_name:
            there = self._by_name[name]
            stored = name if (there.shape, there.dtype) == (tensor.shape, tensor.dtype) else None
        if stored is not None:
            return stored, False
        if memory is not None and memory in self._kept_by_memory:
            return self._kept_by_memory[memory], True
        while name in self._taken:
            name += "_"
        check_savable(name, tensor)
        self._taken.add(name)
        self.kept.append(Entry(name, "buffer", None, None, TensorSource.of(tensor.detach())))
        if memory is not None:
            self._kept_by_memory[memory] = name
        return name, True
