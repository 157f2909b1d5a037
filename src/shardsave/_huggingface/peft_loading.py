"""Loading an adapter into a PEFT model: from the names on disk to those in the module; the base model keeps its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from shardsave._format.dtypes import torch_shape
from shardsave._huggingface.peft_names import active_adapters, adapter_of, named_tensors
from shardsave._loading.disk_layout import Beside, IdentityLayout
from shardsave._storage.checkpoint import Located
from shardsave.errors import IncompatibleCheckpointError


class AdapterLayout(IdentityLayout):
    """The layout of an adapter for a PEFT model. Its checkpoint records flags by the names in the model."""

    def __init__(self, names: Mapping[str, str], beside: Sequence[Beside], stored: Mapping[str, Located]) -> None:
        """``names``: name on disk → name in the model. ``stored``: name on disk → stored tensor."""
        apart = {part.located.name for part in beside}
        super().__init__({names.get(name, name): located for name, located in stored.items() if name not in apart})
        self.beside = beside
        self._adapter = frozenset(names.values())

    def may_be_missing(self, name: str) -> bool:
        """Whether ``name`` belongs to the base model."""
        return name not in self._adapter


def adapter_layout(model: Any, stored: Mapping[str, Located], where: str) -> AdapterLayout | None:
    """The layout of ``stored`` (name on disk → stored tensor) for the active adapter of a PEFT ``model``; None if ``stored`` is no adapter,
    or if the model does not have exactly one active adapter.

    ``where``: the path of the checkpoint, for messages. Raises IncompatibleCheckpointError.
    """
    active = active_adapters(model)
    if len(active) != 1:
        return None
    tensors = named_tensors(model)
    adapter = adapter_of(model, tensors)
    base = tensors.keys() - set(adapter.names.values())
    saved = adapter.names.keys() | adapter.computed.keys()
    if saved.isdisjoint(stored) or not base.isdisjoint(stored):
        return None
    beside = {name: in_dict(model, name, active[0]) for name in adapter.computed}
    if computed := sorted(name for name, owner in beside.items() if owner is None):
        raise IncompatibleCheckpointError(
            f"cannot load {where}: an adapter whose tensors are all in the model was expected, PEFT computes "
            f"{', '.join(computed)} for the file; use PeftModel.from_pretrained; the module is unchanged"
        )
    return AdapterLayout(adapter.names, besides(beside, stored, active[0], where), stored)


def in_dict(model: Any, saved: str, adapter: str) -> dict[str, torch.Tensor] | None:
    """The dict of a sub-module where PEFT keeps what is ``saved`` on disk, such as the indices of SHiRA; None: there is none."""
    path, _, attribute = saved.rpartition(".")
    try:
        owner = getattr(model.get_submodule(path), attribute)
    except AttributeError:
        return None
    return owner if isinstance(owner, dict) and isinstance(owner.get(adapter), torch.Tensor) else None


def besides(owners: Mapping[str, Any], stored: Mapping[str, Located], adapter: str, where: str) -> list[Beside]:
    """What of ``stored`` belongs to ``owners``: name on disk → dict with the tensor of ``adapter``. Raises IncompatibleCheckpointError."""
    found = []
    for name, owner in owners.items():
        shape, wanted = (
            torch_shape(stored[name].dtype, stored[name].shape) if name in stored else None,
            tuple(owner[adapter].shape),
        )
        if shape != wanted:
            difference = f"it is {list(shape)} on disk" if shape is not None else "there is none"
            raise IncompatibleCheckpointError(
                f"cannot load {where}: a tensor {name!r} of shape {list(wanted)} was expected, {difference}; the module is unchanged"
            )
        found.append(Beside(stored[name], partial(_memory, owner, adapter)))
    return found


def _memory(owner: dict[str, torch.Tensor], adapter: str) -> torch.Tensor:
    if owner[adapter].is_meta:
        owner[adapter] = torch.empty_like(owner[adapter], device="cpu")
    return owner[adapter]
