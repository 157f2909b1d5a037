"""Puts the memory that accelerate reads in the place of placeholders, while a sub-module that loads itself fills its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from shardsave._loading.slots import Slot
from shardsave.errors import IncompatibleCheckpointError


@contextmanager
def onloaded(slots: Iterable[Slot]) -> Iterator[None]:
    """Gives ``slots``, those that are offloaded, their memory, and afterwards their placeholders back.

    A tensor that was replaced meanwhile is copied to the memory. Raises IncompatibleCheckpointError if its shape does not fit.
    """
    offloaded = [slot for slot in slots if slot.offloaded is not None and not slot.offloaded.spare]
    placeholders = [_tensors(slot)[slot.attribute] for slot in offloaded]
    try:
        for slot, placeholder in zip(offloaded, placeholders):
            memory = slot.tensor if slot.is_buffer else nn.Parameter(slot.tensor, placeholder.requires_grad)
            _tensors(slot)[slot.attribute] = memory
        yield
        for slot in offloaded:
            _keep(slot)
    finally:
        for slot, placeholder in zip(offloaded, placeholders):
            _tensors(slot)[slot.attribute] = placeholder


def _tensors(slot: Slot) -> dict[str, torch.Tensor]:
    return slot.owner._buffers if slot.is_buffer else slot.owner._parameters  # type: ignore[return-value]


def _keep(slot: Slot) -> None:
    value = _tensors(slot).get(slot.attribute)
    if value is None or value.shape != slot.tensor.shape:
        shape = "removed" if value is None else f"of shape {list(value.shape)}"
        raise IncompatibleCheckpointError(
            f"cannot load {slot.name!r}: shape {list(slot.tensor.shape)} was expected, since accelerate offloads it, the loading routine "
            f"of its module has made it {shape}"
        )
    if value.data_ptr() != slot.tensor.data_ptr():
        with torch.no_grad():
            slot.tensor.copy_(value)
