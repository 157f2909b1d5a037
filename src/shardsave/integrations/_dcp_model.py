"""What a state dict does not say of its model: flags, kinds, ties, and the files that belong beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from shardsave._common.imports import import_at_use
from shardsave._huggingface.recognize import transformers_model
from shardsave._state.wrappers import Names

#: What FSDP's older wrapper puts into the names of parameters, but not into those of its state dict.
_FSDP = "_fsdp_wrapped_module."


class ModelRecord(NamedTuple):
    """What was true of a model at one moment. It holds no tensor, so it can be sent to another process.

    ``kind``: the class, for messages. ``names``: every name that a state dict may have for a tensor → its name without wrappers.
    ``frozen``: name of a parameter → its flag. ``leaders``: name of a tied tensor → the name under which it is stored.
    ``companions``: file name → content.
    """

    kind: str
    names: Mapping[str, str]
    frozen: Mapping[str, bool]
    leaders: Mapping[str, str]
    companions: Mapping[str, bytes]


def record_of(model: nn.Module) -> ModelRecord:
    """Reads attributes only: no hook runs and nothing is collective, so any thread may call it beside forward and backward."""
    wrapped = Names.of(model)
    names: dict[str, str] = {}
    frozen: dict[str, bool] = {}
    first_name: dict[int, str] = {}
    first: dict[str, str] = {}
    for listed, are_parameters in (
        (model.named_parameters(remove_duplicate=False), True),
        (model.named_buffers(remove_duplicate=False), False),
    ):
        for name, tensor in listed:
            plain = wrapped.plain(name).replace(_FSDP, "")
            names[name] = names[plain] = plain
            if are_parameters:
                frozen[plain] = not tensor.requires_grad
            first[plain] = first_name.setdefault(id(tensor), plain)
    companions: dict[str, bytes] = {}
    tied = {name: leader for name, leader in first.items() if leader in {*_repeated(first)}}
    published = transformers_model(model)
    if published is not None:
        import_at_use("shardsave._huggingface.transformers_saving")
        from shardsave._huggingface import transformers_saving

        companions = transformers_saving.companions(published)
        tied = transformers_saving.leaders_of_ties(published, tied)
    leaders = {name: leader for name, leader in tied.items() if name != leader}
    return ModelRecord(type(model).__name__, names, frozen, leaders, companions)


def _repeated(first: Mapping[str, str]) -> list[str]:
    """The names that are the first one of some other name."""
    return [leader for name, leader in first.items() if name != leader]
