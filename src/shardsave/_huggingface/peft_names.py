"""The active adapter of a PEFT model: which tensors belong to it, and the names that PEFT gives them on disk."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Adapter(NamedTuple):
    """The active adapter of a model.

    ``names``: name on disk → name in the module. ``computed``: name on disk → tensor, for tensors that PEFT computes when it saves
    and that are not in the module.
    """

    names: Mapping[str, str]
    computed: Mapping[str, torch.Tensor]


def adapter_of(model: Any, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """The adapter that PEFT would save for ``model``; ``tensors``: all of the model's tensors, by their names in the module."""
    utils = importlib.import_module("peft.utils")
    # save_embedding_layers=False, because PEFT would otherwise look up the base model's config on the Hub.
    on_disk = utils.get_peft_model_state_dict(
        model, state_dict=dict(tensors), adapter_name=active_adapter(model), save_embedding_layers=False
    )
    in_module = {id(tensor): name for name, tensor in tensors.items()}
    names = {saved: in_module[id(tensor)] for saved, tensor in on_disk.items() if id(tensor) in in_module}
    return Adapter(names, {saved: tensor for saved, tensor in on_disk.items() if saved not in names})


def active_adapter(model: Any) -> str:
    """The name of the one active adapter of a PEFT ``model``. Raises ValueError."""
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"one adapter is saved at a time, {len(names)} are active ({', '.join(names)}): choose by set_adapter")
    return str(names[0])
