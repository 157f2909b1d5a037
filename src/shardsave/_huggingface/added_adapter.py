"""The adapters that ``model.add_adapter`` put into a transformers model, and the names of its tensors without them.

PEFT wraps the layers that an adapter changes, so the weights of the model have other names in memory than without an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from shardsave._common.imports import import_at_use
from shardsave._huggingface.peft_names import active_adapters, adapter_of
from shardsave._huggingface.transformers_names import NamesInMemory, converts, model_transforms
from shardsave._state.wrappers import Names

#: What PEFT puts before the names of a model in the file of its adapter.
PREFIX = "base_model.model."


class AddedAdapter(NamedTuple):
    """The active adapter of a transformers model.

    ``plain``: name in memory → name without the layers of PEFT, for every tensor that is not in ``own``; a module that PEFT has in two
    places has one name. ``own``: name on disk → name
    in memory, for the tensors of the adapter. ``copies``: name on disk → tensor, for what PEFT's file also has: tensors of the base
    model, or computed ones. Both are empty unless exactly one adapter is active.
    """

    plain: Mapping[str, str]
    own: Mapping[str, str]
    copies: Mapping[str, torch.Tensor]


def added_adapter(model: Any, tensors: Mapping[str, torch.Tensor]) -> AddedAdapter:
    """The adapter in ``tensors``, all of ``model`` by their names in memory."""
    own: dict[str, str] = {}
    copies: dict[str, torch.Tensor] = {}
    active = active_adapters(model)
    if len(active) == 1:
        adapter = adapter_of(model, tensors)
        for saved, name in adapter.names.items():
            if active[0] in name.split("."):
                own[PREFIX + saved] = name
            else:  # of the base model, such as the biases with bias="all"
                copies[PREFIX + saved] = tensors[name]
        copies.update((PREFIX + saved, tensor) for saved, tensor in adapter.computed.items())
    wrapped = _wrapped(model)
    in_file = set(own.values())
    return AddedAdapter({name: _without(wrapped, name) for name in tensors if name not in in_file}, own, copies)


def not_read(model: Any, added: AddedAdapter) -> list[str]:
    """The adapter's tensors for which transformers' `load_adapter` would not know PEFT's names; those with a name in memory by that."""
    try:
        conversion = import_at_use("peft.utils.transformers_weight_conversion")
    except ImportError:  # older versions of transformers leave the names to PEFT
        return []
    if not added.own or not converts():
        return []
    (active,) = active_adapters(model)
    transforms = conversion.build_peft_weight_mapping(model_transforms(model), active, peft_config=model.peft_config[active])
    renaming = import_at_use("transformers.core_model_loading").WeightRenaming
    wrapper = import_at_use("peft.utils.other").AuxiliaryTrainingWrapper
    for name, module in model.named_modules():
        if isinstance(module, wrapper):
            names = module.adapter_state_dict_load_map(active)
            transforms += [renaming(f"{name}.{saved}", f"{name}.{inside}") for saved, inside in names.items()]
    known = {*added.plain, *added.own.values()}
    renamed = NamesInMemory(model, known, transforms).of([*added.own, *added.copies])
    return [
        added.own.get(saved, saved)
        for saved, (name, pattern) in renamed
        if not pattern and name != added.own.get(saved, name if name in known else None)
    ]


def _wrapped(model: Any) -> list[tuple[str, str]]:
    """For each layer of PEFT, the prefix of its own name and that of the layer inside it; inner layers come first."""
    tuners = import_at_use("peft.tuners.tuners_utils")
    utils = import_at_use("peft.utils.other")
    names = Names.of(model)
    found = []
    originals: dict[int, str] = {}  # id of the module inside a wrapper → the prefix of the wrapper
    for name, module in model.named_modules(remove_duplicate=False):
        start = names.plain(f"{name}.")
        if isinstance(module, utils.AuxiliaryTrainingWrapper):
            originals[id(module.original_module)] = start
            found.append((start, f"{start}original_module."))
        elif isinstance(module, tuners.BaseTunerLayer):
            # The adapter of single tokens has the wrapped module a second time.
            found.append((originals.get(id(getattr(module, "base_layer", None)), start), f"{start}base_layer."))
    return found[::-1]


def _without(wrapped: list[tuple[str, str]], name: str) -> str:
    for start, inside in wrapped:
        if name.startswith(inside):
            name = start + name[len(inside) :]
    return name
