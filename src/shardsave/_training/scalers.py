"""Scalers of gradients: whether torch's can go on from a state. It raises for some, and takes others that fail in a later step."""

from __future__ import annotations

from typing import Any

import torch

from shardsave._common.words import some
from shardsave._training.value_kinds import NUMBER, kind_in_words, value_in_words


def wrong_scaler(scaler: Any, state: Any, path: str) -> str | None:
    """What in ``state`` the ``scaler`` could not go on from, in words; None if there is nothing, or nothing is known of its class."""
    if not isinstance(scaler, torch.amp.GradScaler) or type(scaler).load_state_dict is not torch.amp.GradScaler.load_state_dict:
        return None
    own = scaler.state_dict()
    if not own:  # it is disabled, and takes no state
        return None
    if not isinstance(state, dict):
        return f"{path}: a dict was expected, the checkpoint has {value_in_words(state)}"
    if not state:
        return f"{path}: it is enabled, the checkpoint has the state of a disabled one"
    if lacking := [repr(key) for key in own if key not in state]:
        return f"{path}: {some(lacking)} was expected, the checkpoint has none"
    for key in own:
        if kind_in_words(state[key]) != NUMBER:
            return f"{path}[{key!r}]: {NUMBER} was expected, the checkpoint has {value_in_words(state[key])}"
    return None
