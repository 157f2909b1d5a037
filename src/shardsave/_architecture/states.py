"""What the ``__setstate__`` of torch's own modules do, as functions of the state alone: they call nothing that it contains.

torch's own run operators and attribute lookups of values from the file, and loop over a number of layers that the file chooses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional
from torch import nn

from shardsave._architecture.class_checks import title
from shardsave._common.words import an

State = dict[str, Any]


class Unfit(Exception):
    """The state is not one that the module can have; the words say what was expected, and what was found."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(wanted, found)
        self.wanted, self.found = wanted, found


def _defaults(**defaults: Any) -> Callable[[State], None]:
    """For attributes that modules saved by older versions of torch lack."""

    def set_defaults(state: State) -> None:
        for name, value in defaults.items():
            state.setdefault(name, value)

    return set_defaults


def _recurrent(state: State) -> None:
    """For a recurrent layer: a weak reference to each of its weights, in order."""
    state.setdefault("proj_size", 0)
    rows = state.get("_all_weights")
    if type(rows) is not list or not all(type(row) is list and all(type(name) is str for name in row) for row in rows):
        raise Unfit("_all_weights expected to be lists of names", f"it is {an(title(type(rows)))}")
    weights = state.get("_flat_weights")
    if type(weights) is not list or not all(weight is None or issubclass(type(weight), torch.Tensor) for weight in weights):
        raise Unfit("_flat_weights expected to be a list of tensors", f"it is {an(title(type(weights)))}")
    state["_flat_weight_refs"] = [weakref.ref(weight) if weight is not None else None for weight in weights]


#: The class of torch that defines a ``__setstate__`` → what is done instead.
REVIEWED_STATES: Mapping[type, Callable[[State], None]] = {
    nn.Module: _defaults(),
    nn.AvgPool3d: _defaults(padding=0, ceil_mode=False, count_include_pad=True),
    nn.LogSoftmax: _defaults(dim=None),
    nn.MultiheadAttention: _defaults(_qkv_same_embed_dim=True),
    nn.RNNBase: _recurrent,
    nn.Softmax: _defaults(dim=None),
    nn.Softmin: _defaults(dim=None),
    nn.TransformerDecoderLayer: _defaults(activation=torch.nn.functional.relu),
    nn.TransformerEncoderLayer: _defaults(activation=torch.nn.functional.relu),
    nn.Upsample: _defaults(recompute_scale_factor=True),
    nn.modules.conv._ConvNd: _defaults(padding_mode="zeros"),
}
