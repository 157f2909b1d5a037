"""Recognises what a training run stores beside the weights: the state of optimizers, schedulers and random number generators.

Names alone decide only where no weights have such a name; otherwise the form of the values decides. What is not recognised counts as
weights, so a doubt leads to a question and not to a loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from shardsave._foreign.containers import is_container, tensors_in

_OPTIMIZER = re.compile(r"(?:\w+_)?optim(?:izer)?s?(?:_(?:states?|dicts?|[a-z0-9]))*", re.IGNORECASE)
_COUNTERS = re.compile(r"(?:\w+_)?(?:schedulers?|callbacks|loops)(?:_(?:states?|dicts?|[a-z0-9]))*", re.IGNORECASE)
_RANDOM = re.compile(r"(?:.*[_.])?rng(?:[_.].*)?", re.IGNORECASE)

#: Keys of `Optimizer.state_dict`, and of `GradScaler.state_dict`.
_FORMS = ({"state", "param_groups"}, {"scale", "growth_factor", "backoff_factor"})


def is_training_state(name: str, value: Any) -> bool:
    """Whether the container ``value``, which a file holds under ``name``, is training state."""
    if not is_container(value):
        return False
    if isinstance(value, dict) and any(form <= value.keys() for form in _FORMS):
        return True
    if _OPTIMIZER.fullmatch(name):
        return True
    if _COUNTERS.fullmatch(name):
        return all(_elements(tensor) <= 1 for tensor in tensors_in(value))
    return _RANDOM.fullmatch(name) is not None and all(map(_is_random_state, tensors_in(value)))


def are_random_states(tensors: Mapping[str, Any]) -> bool:
    """Whether ``tensors`` are states of random number generators only, as `torch.get_rng_state` returns them."""
    return all(_RANDOM.fullmatch(name) is not None and _is_random_state(tensor) for name, tensor in tensors.items())


def _is_random_state(tensor: Any) -> bool:
    return tensor.dtype == torch.uint8 and len(tensor.shape) == 1


def _elements(tensor: Any) -> int:
    return torch.Size(tensor.shape).numel()
