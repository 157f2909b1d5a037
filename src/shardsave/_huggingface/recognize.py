"""Whether a module is a model of transformers or of PEFT. Neither is imported for the question: a model of theirs already did that."""

from __future__ import annotations

import sys
from typing import Any

import torch

from shardsave._state.module import unwrap


def transformers_model(source: object) -> Any:
    """The ``PreTrainedModel`` that ``source`` is, seen through wrappers; None where it is not one."""
    return _instance_of(source, "transformers.modeling_utils", "PreTrainedModel")


def peft_model(source: object) -> Any:
    """The ``PeftModel`` that ``source`` is, seen through wrappers; None where it is not one."""
    return _instance_of(source, "peft.peft_model", "PeftModel")


def _instance_of(source: object, module: str, class_name: str) -> Any:
    kind = getattr(sys.modules.get(module), class_name, None)
    if kind is None or not isinstance(source, torch.nn.Module):
        return None
    inner = unwrap(source)
    return inner if isinstance(inner, kind) else None
