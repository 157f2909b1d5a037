"""Loading an adapter into a PEFT model: from the names on disk to those in the module; the base model keeps its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsave._huggingface.peft_names import active_adapters, adapter_of
from shardsave._loading.disk_layout import IdentityLayout
from shardsave._state.wrappers import Names
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class AdapterLayout(IdentityLayout):
    """The layout of an adapter for a PEFT model. Its checkpoint records flags by the names in the model."""

    def __init__(self, names: Mapping[str, str], stored: Mapping[str, Located]) -> None:
        """``names``: name on disk → name in the model. ``stored``: name on disk → stored tensor."""
        super().__init__({names.get(name, name): located for name, located in stored.items()})
        self._adapter = frozenset(names.values())

    def may_be_missing(self, name: str) -> bool:
        """Whether ``name`` belongs to the base model."""
        return name not in self._adapter


def adapter_layout(model: Any, stored: Mapping[str, Located], where: str) -> AdapterLayout | None:
    """The layout of ``stored`` (name on disk → stored tensor) for the active adapter of a PEFT ``model``; None if ``stored`` is no adapter,
    or if the model does not have exactly one active adapter.

    ``where``: the path of the checkpoint, for messages. Raises IncompatibleCheckpointError.
    """
    if len(active_adapters(model)) != 1:
        return None
    names = Names.of(model)
    tensors = {names.plain(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    adapter = adapter_of(model, tensors)
    saved = adapter.names.keys() | adapter.computed.keys()
    if not any(name in saved and name not in tensors for name in stored):
        return None
    if adapter.computed:
        raise IncompatibleCheckpointError(
            f"cannot load {where}: an adapter whose tensors are all in the model was expected, PEFT computes "
            f"{', '.join(sorted(adapter.computed))} for the file; use PeftModel.from_pretrained; the module is unchanged"
        )
    return AdapterLayout(adapter.names, stored)
