"""Loading into a transformers model with adapters: what `added_adapter_saving` or `save_pretrained` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardsave._huggingface.added_adapter import PREFIX, AddedAdapter, added_adapter
from shardsave._huggingface.peft_loading import besides, in_dict
from shardsave._huggingface.peft_names import active_adapters, named_tensors
from shardsave._huggingface.transformers_loading import TransformersLayout
from shardsave._loading.disk_layout import Beside, Join
from shardsave._loading.slots import Inventory
from shardsave._storage.checkpoint import Located

Values = Mapping[str, torch.Tensor]


class AddedAdapterLayout:
    """The layout of a transformers model with adapters; see `shardsave._loading.disk_layout.DiskLayout`."""

    def __init__(self, inventory: Inventory, stored: Mapping[str, Located], where: str) -> None:
        """The arguments are those of `TransformersLayout`. Raises IncompatibleCheckpointError."""
        model: Any = inventory.module
        added = added_adapter(model, named_tensors(model))
        in_memory = stored.keys() >= inventory.expected  # an architecture refers to the names in memory
        self._plain = {} if in_memory else added.plain
        self._in_memory = {plain: name for name, plain in self._plain.items()}
        own = {} if in_memory else added.own
        rest = {name: located for name, located in stored.items() if name not in own and name not in added.copies}
        expected = frozenset(self._plain.get(name, name) for name in inventory.expected.difference(own.values()))
        self._whole = TransformersLayout(inventory._replace(expected=expected), rest, where)
        self._needed = (
            frozenset(own.values()) if own and not rest else inventory.expected
        )  # `save_pretrained` saves the adapter alone
        self.stored = {self._name(name): located for name, located in self._whole.stored.items()}
        self.stored.update((own[name], stored[name]) for name in own if name in stored)
        self.joins = [
            Join(tuple(map(self._name, join.targets)), join.sources, self._convert(join)) for join in self._whole.joins
        ]
        self.beside = _beside(model, added, stored, where)

    def may_be_missing(self, name: str) -> bool:
        return name not in self._needed or self._whole.may_be_missing(self._plain.get(name, name))

    def flags(self, on_disk: Mapping[str, bool]) -> dict[str, bool]:
        return {self._name(name): frozen for name, frozen in self._whole.flags(on_disk).items()}

    def views(self, tensors: Values) -> list[Sequence[torch.Tensor] | None]:
        return self._whole.views({self._plain.get(name, name): tensor for name, tensor in tensors.items()})

    def _name(self, plain: str) -> str:
        """The name in memory of the tensor that is called ``plain`` without PEFT's layers."""
        return self._in_memory.get(plain, plain)

    def _convert(self, join: Join) -> Callable[[Sequence[torch.Tensor]], Values]:
        return lambda tensors: {self._name(name): value for name, value in join.convert(tensors).items()}


def _beside(model: Any, added: AddedAdapter, stored: Mapping[str, Located], where: str) -> list[Beside]:
    owners = {}
    for name in added.copies:
        if name in stored and (owner := in_dict(model, name.removeprefix(PREFIX), active_adapters(model)[0])) is not None:
            owners[name] = owner
    return besides(owners, stored, active_adapters(model)[0], where) if owners else []
