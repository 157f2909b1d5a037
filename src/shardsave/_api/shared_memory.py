"""Refuses memory that a model and its training state share, and for which the checkpoint has different values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from shardsave._common.memory import address, any_overlap, memory_key, reach
from shardsave._storage.located import Located
from shardsave._training.read_values import UNCHANGED
from shardsave.errors import UnsupportedTensorError


class Filled(NamedTuple):
    """An existing ``tensor`` that will be filled from ``located``. ``name``: for messages."""

    name: str
    located: Located
    tensor: torch.Tensor

    @property
    def span(self) -> tuple[str, int, int]:
        """The device, the begin and the end of its memory."""
        begin = address(self.tensor)
        return str(self.tensor.device), begin, begin + reach(self.tensor)


def check_shared_memory(of_model: Sequence[Filled], of_training: Sequence[Filled]) -> None:
    """Raises UnsupportedTensorError if a tensor of each would be filled in the same memory with different bytes: one would be lost."""
    filled = [one for one in (*of_model, *of_training) if address(one.tensor) and one.tensor.nbytes]
    spans = [one.span for one in filled]
    if not of_model or not of_training or not any_overlap([begin for _, begin, _ in spans], [end for *_, end in spans]):
        return
    in_training = {id(one) for one in of_training}
    for left, right in pairwise(sorted(filled, key=lambda one: one.span)):
        if (id(left) in in_training) == (id(right) in in_training) or not _overlap(left, right):
            continue
        if memory_key(left.tensor.detach()) == memory_key(right.tensor.detach()) and _may_be_equal(left.located, right.located):
            continue
        model, training = (right, left) if id(left) in in_training else (left, right)
        raise UnsupportedTensorError(
            f"cannot fill {training.name!r} of the training state: memory of its own was expected, it shares some with {model.name!r} of "
            f"the model, and their values on disk differ; {UNCHANGED}"
        )


def _overlap(left: Filled, right: Filled) -> bool:
    (device, _, end), (other_device, begin, _) = left.span, right.span
    return device == other_device and begin < end


def _may_be_equal(left: Located, right: Located) -> bool:
    """Whether the stored bytes are the same; assumed where one has no checksum, since it is joined of several."""
    if left.checksum is None or right.checksum is None:
        return True
    return (left.dtype, left.shape, left.checksum) == (right.dtype, right.shape, right.checksum)
