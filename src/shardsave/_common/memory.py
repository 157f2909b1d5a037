"""Where in memory a strided tensor lies, from its first element to behind its last, and whether two share a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

#: Whose address may be asked for; what subclasses say is not always where their data lies.
_WITH_ADDRESS = frozenset({torch.Tensor, nn.Parameter})


def address(tensor: torch.Tensor) -> int:
    """Where its first element lies, 0 where there is no address to ask for: it is on the meta device, empty, or not strided."""
    if type(tensor) not in _WITH_ADDRESS or tensor.layout is not torch.strided or tensor.is_nested:
        return 0
    return tensor.data_ptr()


def reach(tensor: torch.Tensor) -> int:
    """The bytes from the first element to behind the last; none for an empty tensor."""
    if tensor.is_contiguous():  # as an empty one is
        return tensor.nbytes
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return elements * tensor.element_size()


def lacks_memory(tensor: torch.Tensor) -> bool:
    """Whether elements of a strided tensor lie beyond its storage, which somebody freed or made smaller."""
    needed = reach(tensor)
    return needed > 0 and tensor.storage_offset() * tensor.element_size() + needed > tensor.untyped_storage().nbytes()


def any_overlap(begins: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether two of many ranges of addresses meet; those of two devices may seem to."""
    first = np.array(begins, dtype=np.uint64)
    order = np.argsort(first, kind="stable")
    furthest = np.maximum.accumulate(np.array(ends, dtype=np.uint64)[order])
    return bool((first[order][1:] < furthest[:-1]).any())
