"""Which tensors of a PEFT model its adapter consists of, and the names that PEFT gives them on disk."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Adapter(NamedTuple):
    """The active adapter of a model: name on disk → name in the module, and what else it consists of.

    ``computed``: by name on disk, tensors that PEFT makes for the file and the module does not have.
    """

    names: Mapping[str, str]
    computed: Mapping[str, torch.Tensor]


def adapter_of(model: Any, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Which of ``tensors``, all of a PEFT ``model`` by their names in the module, PEFT writes for its active adapter."""
    name = active_adapter(model)
    utils = importlib.import_module("peft.utils")
    # Whether embeddings were resized is not asked for: that looks for the base model's config on the Hub.
    saved_tensors = utils.get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=name, save_embedding_layers=False
    )
    in_module = {id(tensor): known for known, tensor in tensors.items()}
    names = {saved: in_module[id(tensor)] for saved, tensor in saved_tensors.items() if id(tensor) in in_module}
    return Adapter(names, {saved: tensor for saved, tensor in saved_tensors.items() if saved not in names})


def active_adapter(model: Any) -> str:
    """The name of the one active adapter. Raises ValueError where there are several, or none."""
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"one adapter is saved at a time, {len(names)} are active ({', '.join(names)}): choose by set_adapter")
    return str(names[0])
