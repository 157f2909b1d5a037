"""The tensors of a PEFT model that belong to its adapter, and their names on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from shardsave._common.imports import import_at_use
from shardsave._printable import printable
from shardsave._state.wrappers import Names


class Adapter(NamedTuple):
    """The tensors of a model's active adapter.

    ``names``: name on disk → name in the module. ``computed``: name on disk → a tensor that is not in the module, since PEFT
    computes it for the file.
    """

    names: Mapping[str, str]
    computed: Mapping[str, torch.Tensor]


def adapter_of(model: Any, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Selects from ``tensors``, all of a PEFT ``model`` by their names in the module, those that PEFT saves as its active adapter."""
    adapter_name = active_adapter(model)
    utils = import_at_use("peft.utils")
    # False, because with "auto" PEFT looks for the base model's config on the Hub, to learn whether embeddings were resized.
    adapter_tensors = utils.get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=adapter_name, save_embedding_layers=False
    )
    name_of = {id(tensor): name for name, tensor in tensors.items()}
    names = {saved: name_of[id(tensor)] for saved, tensor in adapter_tensors.items() if id(tensor) in name_of}
    return Adapter(names, {saved: tensor for saved, tensor in adapter_tensors.items() if saved not in names})


def named_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of ``model`` by their names without wrappers; each name of a shared tensor has a tensor object of its own."""
    names = Names.of(model)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[names.plain(name)] = tensor.detach() if id(tensor) in seen else tensor
        seen.add(id(tensor))
    return tensors


def active_adapter(model: Any) -> str:
    """The name of the active adapter. Raises ValueError if there are several, or none."""
    names = active_adapters(model)
    if len(names) != 1:
        active = f"{len(names)} are active ({printable(', '.join(names))})" if names else "none is active"
        raise ValueError(f"one adapter is saved at a time, {active}: choose one with set_adapter")
    return names[0]


def active_adapters(model: Any) -> list[str]:
    """The names of the active adapters of a PEFT model, or of a transformers model that has adapters."""
    names = model.active_adapters
    return list(names() if callable(names) else names)
