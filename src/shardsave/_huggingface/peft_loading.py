"""Loads the adapter of a PEFT model: its tensors by their names on disk go into the model, whose base stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardsave._huggingface.peft_names import adapter_of
from shardsave._huggingface.recognize import peft_model
from shardsave._loading.fill_groups import Join
from shardsave._state.module import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class AdapterNames:
    """How an adapter's tensors, by their names on disk, go into a PEFT model, whose base model stays as it is.

    ``stored``: name in the model → stored tensor, and the names on disk of what the model has no use for.
    """

    def __init__(self, names: Mapping[str, str], stored: Mapping[str, Located]) -> None:
        self.joins: list[Join] = []
        self.stored = {names.get(name, name): located for name, located in stored.items()}
        self._own = frozenset(names.values())

    def optional(self, name: str) -> bool:
        """Whether ``name`` is of the base model."""
        return name not in self._own

    def flags(self, given: Mapping[str, bool]) -> dict[str, bool]:
        """They are by names in the model already."""
        return dict(given)

    def views(self, tensors: Mapping[str, torch.Tensor]) -> list[Sequence[torch.Tensor] | None]:
        """None are joined."""
        return []


def adapter_names(source: object, stored: Mapping[str, Located], where: str) -> AdapterNames | None:
    """How ``stored`` goes into the active adapter of ``source``; None where one of the two is no adapter.

    Raises IncompatibleCheckpointError.
    """
    model = peft_model(source)
    if model is None or len(list(model.active_adapters)) != 1:
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
