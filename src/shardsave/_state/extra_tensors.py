"""Tensors that a whole model needs and its weights do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardsave._state.module import PLAIN_TYPES, Entry, check_savable


class ExtraTensors:
    """What a model needs and its weights (``entries``) do not have: non-persistent buffers, tensors in attributes, constants."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.kept: list[Entry] = []
        self._by_name = {entry.name: entry.tensor for entry in entries if isinstance(entry.tensor, torch.Tensor)}
        by_name = reversed(self._by_name.items())
        self._by_memory = {place: name for name, tensor in by_name if (place := _memory(tensor)) is not None}
        self._kept_by_memory: dict[Any, str] = {}
        self._taken = {"", "__metadata__"}

    def place(self, tensor: torch.Tensor, name: str) -> tuple[str, bool]:
        """The name under which the checkpoint has the data of ``tensor``, and whether it is an extra one."""
        memory = _memory(tensor)
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
        self.kept.append(Entry(name, "buffer", None, None, tensor.detach()))
        if memory is not None:
            self._kept_by_memory[memory] = name
        return name, True


def _memory(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """What two tensors that are the same memory have in common; None where there is none."""
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or not (address := tensor.data_ptr()):
        return None
    return address, tensor.dtype, tensor.shape, tensor.stride(), str(tensor.device), tensor.is_conj(), tensor.is_neg()
