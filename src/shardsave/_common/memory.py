"""Where in memory a tensor is: its address, its extent, and which tensors have the same memory or share a part of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

#: Types whose `data_ptr()` is trusted; tensor subclasses may report another address.
PLAIN_TYPES = frozenset({torch.Tensor, nn.Parameter, *([nn.Buffer] if hasattr(nn, "Buffer") else [])})


def address(tensor: torch.Tensor) -> int:
    """The address of the first element; 0 if there is none: a tensor that is empty, on the meta device, not strided or a subclass."""
    if type(tensor) not in PLAIN_TYPES or tensor.layout is not torch.strided or tensor.is_nested:
        return 0
    return tensor.data_ptr()


def memory_key(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors if they are the same elements in the same memory; a tensor without an address only equals itself.

    The conjugate and negative bits count: two such views of one memory have different values.
    """
    begin = address(tensor)
    if not begin:
        return id(tensor)
    return begin, tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()


def shared_names(named: Mapping[str, torch.Tensor], begins: Iterable[int]) -> dict[str, str]:
    """For each name whose tensor has the same memory as an earlier one: the first name with that memory.

    ``begins``: the address of each tensor, 0 for a tensor that is not to be compared.
    """
    begins = list(begins)
    addresses = [begin for begin in begins if begin]
    if len(set(addresses)) == len(addresses):
        return {}
    first_at: dict[int, str] = {}
    first_with: dict[Hashable, str] = {}
    shared = {}
    for (name, tensor), begin in zip(named.items(), begins):
        if not begin:
            continue
        first = first_at.setdefault(begin, name)
        if named[first] is not tensor:  # keys are slow to make, so only tensors with one address get them
            first_with.setdefault(memory_key(named[first]), first)
            first = first_with.setdefault(memory_key(tensor), name)
        if first != name:
            shared[name] = first
    return shared


def reach(tensor: torch.Tensor) -> int:
    """The number of bytes from the first element to the end of the last; 0 for an empty tensor."""
    if tensor.is_contiguous():  # an empty tensor is
        return tensor.nbytes
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return elements * tensor.element_size()


def lacks_memory(tensor: torch.Tensor, reached: int) -> bool:
    """Whether elements of a strided tensor lie beyond its storage, which was freed or made smaller; ``reached``: its `reach`."""
    offset = tensor.storage_offset()
    return reached > 0 and reached + (offset and offset * tensor.element_size()) > tensor.untyped_storage().nbytes()


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two contiguous tensors on one device have the same dtype, shape and bytes; False if one is not contiguous."""
    if (left.dtype, left.shape, left.device) != (right.dtype, right.shape, right.device):
        return False
    if not (left.is_contiguous() and right.is_contiguous()):
        return False
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def any_overlap(begins: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether any two address ranges overlap; ranges on different devices may seem to overlap."""
    first = np.array(begins, dtype=np.uint64)
    order = np.argsort(first, kind="stable")
    furthest = np.maximum.accumulate(np.array(ends, dtype=np.uint64)[order])
    return bool((first[order][1:] < furthest[:-1]).any())


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Every tensor in ``value``, and in the lists, tuples and dicts that it is made of."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
