"""Loading an adapter into a PEFT model: from the names on disk to those in the module; the base model keeps its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardsave._huggingface.adapter import adapter_of
from shardsave._loading.fill_groups import Join
from shardsave._state.module import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class AdapterNames:
    """How an adapter's tensors, by their names on disk, go into a PEFT model.

    ``stored``: name in the model → stored tensor; tensors that the model does not have keep their names on disk.
    """

    def __init__(self, names: Mapping[str, str], stored: Mapping[str, Located]) -> None:
        self.joins: list[Join] = []
        self.stored = {names.get(name, name): located for name, located in stored.items()}
        self._own = frozenset(names.values())

    def optional(self, name: str) -> bool:
        """Whether ``name`` belongs to the base model."""
        return name not in self._own

    def flags(self, given: Mapping[str, bool]) -> dict[str, bool]:
        """An adapter's flags are stored by the names in the model."""
        return dict(given)

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]:
        """Nothing is joined."""
        return []


def adapter_names(model: Any, stored: Mapping[str, Located], where: str) -> AdapterNames | None:
    """How ``stored`` goes into the active adapter of a PEFT ``model``; None if ``stored`` is not an adapter.

    Raises IncompatibleCheckpointError.
    """
    if len(list(model.active_adapters)) != 1:
        return None
    names = Names.of(model)
    tensors = {names.plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    adapter = adapter_of(model, tensors)
    saved = adapter.names.keys() | adapter.computed.keys()
    if not any(name in saved and name not in tensors for name in stored):
        return None
    if adapter.computed:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: an adapter whose tensors are those of the model was expected, PEFT computes "
            f"{', '.join(sorted(adapter.computed))} for the file; use PeftModel.from_pretrained; the module is unchanged"
        )
    return AdapterNames(adapter.names, stored)
