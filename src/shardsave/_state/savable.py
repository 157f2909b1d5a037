"""Checks whether tensors can be saved; others are refused by name, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, le
from typing import Any, NoReturn

import torch

from shardsave._common.memory import PLAIN_TYPES, lacks_memory, reach
from shardsave._common.words import an
from shardsave._format.dtypes import BY_TORCH, logical_shape
from shardsave._state.distributed_tensors import is_distributed
from shardsave.errors import UnsupportedTensorError

#: The dtypes whose tensors have no rule of their own.
_USUAL_DTYPES = frozenset(BY_TORCH) - {torch.float4_e2m1fn_x2}


def refuse(name: object, expected: str, actual: str) -> NoReturn:
    """Raises UnsupportedTensorError for the entry ``name``."""
    raise UnsupportedTensorError(f"cannot save {name!r}: {expected}, {actual}; nothing was written")


def refuse_optimizer(source: Mapping[str, Any]) -> None:
    """Raises UnsupportedTensorError for the state dict of an optimizer, which names parameters by numbers."""
    if source.keys() == {"state", "param_groups"}:
        raise UnsupportedTensorError(
            "cannot save the state dict of an optimizer: names of tensors were expected, it has 'state' and 'param_groups'; "
            "optimizers are not saved: keep torch.save for it, beside the checkpoint; nothing was written"
        )


def check_name(name: str) -> None:
    """Raises UnsupportedTensorError for a name that is no Unicode."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            refuse(name, "a name in Unicode was expected", "it has half of a surrogate pair")


def check_savable(name: str, tensor: torch.Tensor) -> int:
    """Raises UnsupportedTensorError if a file cannot hold ``tensor`` under ``name``; returns `reach`, which it has to know."""
    if name == "__metadata__":
        refuse(name, "another name was expected", "safetensors keeps this one for itself")
    check_name(name)
    if type(tensor) not in PLAIN_TYPES or hasattr(tensor, "__tensor_flatten__"):
        refuse(name, "a plain tensor was expected", f"it is {an(type(tensor).__name__)}{_way_out(tensor)}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        refuse(name, "a strided tensor was expected", f"its layout is {layout}")
    if tensor.is_meta:
        refuse(name, "a tensor with data was expected", "it is on the meta device")
    dtype, nbytes = tensor.dtype, tensor.nbytes
    is_usual = nbytes and dtype in _USUAL_DTYPES and tensor.is_contiguous() and not tensor.storage_offset()
    if is_usual and nbytes <= tensor.untyped_storage().nbytes():
        return nbytes  # nearly all tensors; what follows would say the same of them
    if dtype not in BY_TORCH:
        unknown = str(dtype).removeprefix("torch.")
        raise UnsupportedTensorError(
            f"cannot save {name!r}: dtype {unknown} has no safetensors equivalent; nothing was written"
        )
    reached = reach(tensor)
    if lacks_memory(tensor, reached):
        refuse(name, "memory for all its elements was expected", "its storage was freed or made smaller")
    if reached == 0 and math.prod(size or 1 for size in logical_shape(dtype, tensor.shape)) >= 1 << 63:
        # Some readers multiply sizes in order and may overflow before they meet the zero; torch multiplies them to strides.
        refuse(
            name, "sizes that multiply to fewer than 2^63, its zeros aside, were expected", f"its shape is {list(tensor.shape)}"
        )
    if dtype == torch.float4_e2m1fn_x2 and tensor.dim() == 0:
        refuse(name, "a float4 tensor of at least one dimension was expected", "it has none")
    return reached


def check_all_savable(named: Iterable[str], tensors: Sequence[torch.Tensor], data: Sequence[torch.Tensor]) -> list[int]:
    """`check_savable` for all ``tensors``, of the names ``named``. ``data``: plain tensors with the same memory, which lie side by side."""
    names = [*named]
    usual_names = "".join(names).isascii() and "__metadata__" not in names
    if usual_names and not any(map(hasattr, tensors, repeat("__tensor_flatten__"))) and all_usual(data):
        return [tensor.nbytes for tensor in data]
    return [*map(check_savable, names, tensors)]


_PROPERTIES = tuple(map(attrgetter, ("layout", "is_nested", "is_meta")))
_USUAL = torch.strided, False, False


def all_usual(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether every file can hold each of ``tensors``, as it can nearly all. Each question is put to all at once, which is faster;
    `check_savable` says what is wrong, or that nothing is."""
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        return False
    if any({*map(ask, tensors)} - {usual} for ask, usual in zip(_PROPERTIES, _USUAL)):
        return False
    if not _USUAL_DTYPES.issuperset(map(attrgetter("dtype"), tensors)):
        return False
    if not all(map(torch.Tensor.is_contiguous, tensors)) or any(map(torch.Tensor.storage_offset, tensors)):
        return False
    nbytes = [tensor.nbytes for tensor in tensors]
    in_memory = [storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)]
    return all(nbytes) and all(map(le, nbytes, in_memory))


def _way_out(tensor: torch.Tensor) -> str:
    """What to do with a tensor of which other processes have parts too."""
    if not is_distributed(tensor):
        return ""
    return ", which all of its processes save together: init_process_group must have been called, and each must make the call"
