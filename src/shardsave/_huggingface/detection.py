"""Recognises models of transformers and of PEFT without importing either library.

Where such a model exists, its library has been imported already, so it is enough to look into `sys.modules`.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from shardsave._state.module import unwrap


def pretrained(source: object) -> Any:
    """The transformers model in ``source``, without its wrappers; None if ``source`` is anything else."""
    return _instance(source, "transformers.modeling_utils", "PreTrainedModel")


def adapted(source: object) -> Any:
    """The PEFT model in ``source``, without its wrappers; None if ``source`` is anything else."""
    return _instance(source, "peft.peft_model", "PeftModel")


def _instance(source: object, module_name: str, class_name: str) -> Any:
    kind = getattr(sys.modules.get(module_name), class_name, None)
    if kind is None or not isinstance(source, nn.Module):
        return None
    inner = unwrap(source)
    return inner if isinstance(inner, kind) else None
