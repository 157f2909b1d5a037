"""Extra tensors: tensors that a whole model needs and its weights do not contain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import torch

from shardsave._common.memory import address, memory_key
from shardsave._common.sources import TensorSource
from shardsave._state.module import Entry
from shardsave._state.savable import check_savable


class ExtraTensors:
    """Collects the tensors of a model that are not among its weights: non-persistent buffers, tensors in attributes, constants.

    ``entries``: the weights. ``spread``: `id` of a tensor of which this process has a part → the name under which it is stored.
    ``kept``: the extra tensors so far.
    """

    def __init__(self, entries: Sequence[Entry], spread: Mapping[int, str] = MappingProxyType({})) -> None:
        self._spread = spread
        self.kept: list[Entry] = []
        self._by_name = {entry.name: entry.tensor for entry in entries}
        named = reversed(self._by_name.items())  # of several names with the same memory, the first wins
        self._by_memory = {memory_key(tensor): name for name, tensor in named if address(tensor)}
        self._kept_by_memory: dict[Hashable, str] = {}
        self._taken = {"", "__metadata__"}

    def place(self, tensor: torch.Tensor, name: str) -> tuple[str, bool]:
        """Returns the name under which the checkpoint holds the data of ``tensor``, and whether it is an extra tensor.

        ``name``: the wanted name of an extra tensor. Raises UnsupportedTensorError.
        """
        if id(tensor) in self._spread:
            return self._spread[id(tensor)], False
        memory = memory_key(tensor) if address(tensor) else None
        if memory is not None and memory in self._by_memory:
            return self._by_memory[memory], False
        weight = self._by_name.get(name)
        if memory is None and weight is not None and (weight.shape, weight.dtype) == (tensor.shape, tensor.dtype):
            return name, False
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
