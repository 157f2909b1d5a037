"""Recognises transformers and PEFT models without importing either library: a library that was never imported has no models."""

from __future__ import annotations

import sys
from typing import Any

import torch

from shardsave._state.wrappers import unwrap


def transformers_model(source: object) -> Any:
    """The ``PreTrainedModel`` that ``source`` is or wraps; None if it is something else."""
    return _instance_of(source, "transformers.modeling_utils", "PreTrainedModel")


def peft_model(source: object) -> Any:
    """The ``PeftModel`` that ``source`` is or wraps; None if it is something else."""
    return _instance_of(source, "peft.peft_model", "PeftModel")


def has_added_adapter(model: Any) -> bool:
    """Whether a transformers model has an adapter of its method ``add_adapter``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False)) and bool(getattr(model, "peft_config", None))


def _instance_of(source: object, module: str, class_name: str) -> Any:
    model_class = getattr(sys.modules.get(module), class_name, None)
    if model_class is None or not isinstance(source, torch.nn.Module):
        return None
    inner = unwrap(source)
    return inner if isinstance(inner, model_class) else None
