"""Tensors that are distributed over a mesh of processes. Recognised without an import: whoever has one has imported its class."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor of torch."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor or a DTensor is a Parameter."""
    return type(tensor) is torch.nn.Parameter or (getattr(tensor, "_is_param", False) and is_dtensor(tensor))
