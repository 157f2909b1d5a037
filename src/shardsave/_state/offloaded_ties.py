"""Ties of tensors that accelerate holds on disk, where each name has a copy of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardsave._common.memory import memory_key, same_bytes
from shardsave._common.words import some
from shardsave._state.offload import Offloaded
from shardsave._state.wrappers import Names

#: How many elements are compared before whole tensors are.
_FIRST = 16


def tie_copies(
    module: nn.Module, offloaded: Mapping[str, Offloaded], named: Mapping[str, torch.Tensor], values: dict[str, torch.Tensor]
) -> None:
    """Gives tied tensors with equal ``values`` the same memory: those that ``module`` says it ties, or of which accelerate knows that.

    ``named``: the placeholders of ``values``.
    """
    for name, other in (*_declared(module, values), *_known(offloaded, values)):
        if name not in values or other not in values or not (name in offloaded or other in offloaded):
            continue
        if named[name].dtype == named[other].dtype and same_bytes(values[name], values[other]):
            values[name] = values[other]


def untied_notes(offloaded: Mapping[str, Offloaded], values: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """A note on tensors on disk that have equal values, but nothing says whether they were tied."""
    alike: dict[object, list[str]] = {}
    for name, tensor in values.items():
        if name not in offloaded or not offloaded[name].on_disk or not tensor.is_floating_point():
            continue
        if tensor.dim() and tensor.numel() and tensor.is_contiguous():
            first = tensor.detach().reshape(-1)[:_FIRST].view(torch.uint8).tolist()
            alike.setdefault((tensor.dtype, tensor.shape, *first), []).append(name)
    equal = [name for names in alike.values() for name in _equal(names, values)]
    if not equal:
        return ()
    return (
        f"{some(equal)} have equal values on disk, where accelerate does not keep ties: they are saved as separate tensors; to keep "
        f"ties, save before the model is offloaded",
    )


def _declared(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names that sub-modules say they tie, in the way of transformers."""
    plain = Names.of(module).plain
    for name, part in module.named_modules():
        start = f"{name}." if name else ""
        keys: Any = getattr(part, "all_tied_weights_keys", None)  # of this instance, as its config says
        if keys is None and getattr(getattr(part, "config", None), "tie_word_embeddings", True):
            keys = getattr(part, "_tied_weights_keys", None)
        if isinstance(keys, Mapping):
            yield from ((plain(start + target), plain(start + source)) for target, source in keys.items())
        elif isinstance(keys, (list, tuple)):  # of older versions, which do not name the other tensor
            targets = [plain(start + target) for target in keys]
            yield from ((target, other) for target in targets for other in values if other not in targets)


def _known(offloaded: Mapping[str, Offloaded], values: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names that may be tied: accelerate knows that each of them was tied to something."""
    tied = [name for name in values if name in offloaded and offloaded[name].tied]
    for number, other in enumerate(tied):
        yield from ((name, other) for name in tied[number + 1 :])


def _equal(names: list[str], values: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of ``names`` whose tensors equal the first one of them in other memory, unless all of their elements are the same."""
    first = values[names[0]]
    if len(names) == 1:
        return []
    rows = first.detach().reshape(-1).view(torch.uint8).reshape(first.numel(), -1)  # not every dtype can be compared
    if bool((rows == rows[0]).all()):
        return []
    key = memory_key(first)
    equal = [name for name in names[1:] if memory_key(values[name]) != key and same_bytes(values[name], first)]
    return [names[0], *equal] if equal else []
