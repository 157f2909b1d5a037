"""Tensor subclasses that consist of other tensors (``__tensor_flatten__``): the one place that decides about them.

None is stored yet. The format reserves the tag ``subclass`` for them.
"""

from __future__ import annotations

from typing import Any

import torch

from shardsave._common.words import an
from shardsave.errors import UnsupportedTensorError

#: The tag of a value that is such a tensor.
TAG = "subclass"


def write_subclass(tensor: torch.Tensor, path: str) -> Any:
    """The value for ``tensor``, which consists of other tensors. Raises UnsupportedTensorError, since no class can be stored yet."""
    raise UnsupportedTensorError(
        f"cannot save {path}: a plain tensor was expected, it is {an(type(tensor).__name__)}, which consists of other tensors; "
        f"nothing was written"
    )
