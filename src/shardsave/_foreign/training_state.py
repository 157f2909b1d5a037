"""Recognises what a training run stores beside the weights: the state of optimizers, schedulers and random number generators.

The form of the values decides. A name helps only if it is one that training loops use by convention, and if the values do not look like
those of a network. What is not recognised counts as weights, so a doubt leads to a question and not to a loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from shardsave._foreign.containers import children, is_container, is_tensor, tensors_in, without_attributes

_OPTIMIZER = re.compile(r"optim(?:izer)?(?:_states?|_dicts?|_[a-z0-9])*|optimizers", re.IGNORECASE)
_COUNTERS = re.compile(r"(?:\w+_)?(?:schedulers?|callbacks|loops)(?:_(?:states?|dicts?|[a-z0-9]))*", re.IGNORECASE)
_RANDOM = re.compile(r"(?:.*[_.])?rng(?:_?states?)?(?:[_.](?:all|cpu|cuda|gpu|mps|xpu|torch|numpy|np|\d+))*", re.IGNORECASE)

#: Where the keys of a distributed checkpoint that flattens an optimizer's state begin.
_FLATTENED = ("state.", "param_groups.")

#: The bytes of a generator's state: on the CPU, on CUDA and XPU (now, and before torch 1.8), and on MPS.
_RANDOM_BYTES = frozenset({5056, 16, 816_000, 816_016, 44})

#: The words of NumPy's legacy generator, whose state is a sequence or a mapping that begins with the generator's name.
_NUMPY_WORDS = 624

_SCALER = frozenset({"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"})


def is_training_state(name: str, value: Any) -> bool:
    """Whether the container ``value``, which a file holds under ``name``, is training state."""
    if not is_container(value):
        return False
    if isinstance(value, dict) and (_is_optimizer(value) or (value.keys() >= _SCALER and _has_only_numbers(value))):
        return True
    if _is_numpy_generator(value):
        return True
    if _OPTIMIZER.fullmatch(name):
        return not _has_weights(value)
    if _COUNTERS.fullmatch(name):
        return _has_only_numbers(value)
    return _RANDOM.fullmatch(name) is not None and all(map(_is_random_state, tensors_in(value)))


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    """Whether ``value`` is what `Optimizer.state_dict` returns: the tensors of each parameter are apart, and groups list parameters."""
    state, groups = value.get("state"), value.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, (list, dict)):
        return False
    listed = [group for _, group in children(groups)]
    return (
        bool(listed)
        and all(isinstance(group, dict) and "params" in group for group in listed)
        and not any(map(is_tensor, state.values()))
    )


def _is_numpy_generator(value: Any) -> bool:
    """Whether ``value`` is what `numpy.random.get_state` or the ``state`` of a bit generator returns."""
    first = value.get("bit_generator") if isinstance(value, dict) else next((child for _, child in children(value)), None)
    words = [*tensors_in(value)]
    return isinstance(first, str) and len(words) == 1 and _is_random_state(words[0])


def _has_weights(value: Any) -> bool:
    """Whether a mapping in ``value`` has tensors under names with dots, as the state of a network has and that of an optimizer has not."""
    visited: set[int] = set()
    waiting = [value]
    while waiting:
        container = waiting.pop()
        visited.add(id(container))
        for key, child in children(container):
            if is_container(child) and id(child) not in visited:
                waiting.append(child)
            if (
                is_tensor(without_attributes(child))
                and isinstance(container, dict)
                and "." in key
                and not key.startswith(_FLATTENED)
            ):
                return True
    return False


def are_random_states(tensors: Mapping[str, Any]) -> bool:
    """Whether ``tensors`` are states of random number generators only, as `torch.get_rng_state` returns them."""
    return all(_RANDOM.fullmatch(name) is not None and _is_random_state(tensor) for name, tensor in tensors.items())


def _is_random_state(tensor: Any) -> bool:
    if len(tensor.shape) != 1:
        return False
    elements = _elements(tensor)
    return (tensor.dtype, elements) == (torch.uint32, _NUMPY_WORDS) or (
        tensor.dtype == torch.uint8 and elements in _RANDOM_BYTES
    )


def _has_only_numbers(value: Any) -> bool:
    return all(_elements(tensor) <= 1 for tensor in tensors_in(value))


def _elements(tensor: Any) -> int:
    return torch.Size(tensor.shape).numel()
