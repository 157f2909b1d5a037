"""Whether memory can be filled in place at all: what is refused by name, before a single tensor is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from shardsave._common.memory import PLAIN_TYPES, any_overlap, lacks_memory, reach
from shardsave._loading.slots import Slot
from shardsave.errors import UnsupportedTensorError, an

#: How much work numpy may put into the question whether two strided views share an element.
_OVERLAP_WORK = 100_000


def check_shaped(slot: Slot, where: str) -> None:
    """Refuses what has no shape yet."""
    if is_lazy(slot.tensor):
        _refuse(slot.name, where, "a parameter with a shape was expected", "it is lazy; run a forward pass first")


def check_plain(slot: Slot, where: str) -> None:
    """Refuses tensor subclasses, whose memory is not theirs alone or not here: FSDP's DTensor has hooks that know no plain one."""
    tensor = slot.tensor
    if hasattr(tensor, "__tensor_flatten__") or (type(tensor) not in PLAIN_TYPES and not is_lazy(tensor)):
        _refuse(slot.name, where, "a plain tensor was expected", f"it is {an(type(tensor).__name__)}")


def check_fillable(slot: Slot, stored: torch.dtype, where: str) -> None:
    """Refuses what cannot be written in place, with values of dtype ``stored``."""
    check_plain(slot, where)
    tensor = slot.tensor
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        _refuse(slot.name, where, "a strided tensor was expected", f"its layout is {layout}")
    if tensor.is_quantized:
        _refuse(slot.name, where, "a plain tensor was expected", f"it is quantized ({_short(tensor.dtype)})")
    if tensor.dtype != stored and torch.float4_e2m1fn_x2 in (tensor.dtype, stored):
        _refuse(
            slot.name, where, f"dtype {_short(stored)} was expected", f"it is {_short(tensor.dtype)}, and torch has no cast"
        )
    if tensor.is_meta:
        return
    if lacks_memory(tensor):
        _refuse(slot.name, where, "memory for all its elements was expected", "its storage was freed or made smaller")
    if tensor.is_contiguous():
        return
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        _refuse(slot.name, where, "memory for each element was expected", "it is expanded; call .contiguous() on it first")
    if _may_hit_itself(tensor):
        found = f"elements of it share theirs, its strides are {list(tensor.stride())}; call .contiguous() on it first"
        _refuse(slot.name, where, "memory for each element was expected", found)


def _may_hit_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at one place; of strides that no slicing or transposing makes it is assumed."""
    behind = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < behind:
            return True
        behind += (size - 1) * stride
    return False


def refuse_overlaps(slots: Iterable[Slot], owners: Mapping[str, str], where: str) -> None:
    """Refuses strided tensors, each filled on its own, that share a part of their memory: one would undo the other.

    ``owners``: of those that a sub-module fills by a routine of its own its name; what these do within themselves is theirs.
    """
    there, begins, ends = [], [], []
    for slot in slots:
        if begin := slot.tensor.data_ptr():  # there is none on the meta device, and none of an empty tensor
            there.append(slot)
            begins.append(begin)
            ends.append(begin + reach(slot.tensor))
    if not any_overlap(begins, ends):
        return
    spans = [(str(slot.tensor.device), begin, end, slot) for begin, end, slot in zip(begins, ends, there)]
    spans.sort(key=lambda span: span[:3])
    alive: list[tuple[str, int, int, Slot]] = []
    for span in spans:
        device, begin, _, slot = span
        owner = owners.get(slot.name)
        alive = [other for other in alive if other[0] == device and other[2] > begin]
        for *_, other in alive:
            if (owner is None or owner != owners.get(other.name)) and _share_an_element(other.tensor, slot.tensor):
                _refuse(
                    slot.name,
                    where,
                    "memory of its own was expected",
                    f"it shares a part of it with {other.name!r}; call .clone() on one of them first",
                )
        alive.append(span)


def _share_an_element(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Exactly, also for interleaved views; what is too hard to tell counts as shared."""
    try:
        return np.shares_memory(_layout(left), _layout(right), max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except RuntimeError:  # numpy's TooHardError, which moved between its versions
        return True


def _layout(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    """An array that lies where ``tensor`` does, for arithmetic alone: the address may be a device's and is never read."""
    item = tensor.element_size()

    class Interface:
        def __init__(self) -> None:
            self.__array_interface__ = {
                "version": 3,
                "typestr": f"|V{item}",
                "shape": tuple(tensor.shape),
                "strides": tuple(stride * item for stride in tensor.stride()),
                "data": (tensor.data_ptr(), True),
            }

    return np.asarray(Interface())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(name: str, where: str, wanted: str, found: str) -> NoReturn:
    raise UnsupportedTensorError(f"cannot fill {name!r} from {where}: {wanted}, {found}; the module is unchanged")
