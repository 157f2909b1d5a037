"""The argument ``device`` of the verbs that load."""

from __future__ import annotations

from typing import Union

import torch

Device = Union[str, torch.device, int, None]


def check_device(device: Device) -> torch.device | None:
    """``device`` as a `torch.device` that exists and holds data, None for None. Raises TypeError, ValueError."""
    if device is None:
        return None
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device must be a torch.device, its name or its number, not {type(device).__name__}")
    try:
        checked = torch.device(device)
        if checked.type != "meta":
            torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} was asked for, torch has no such device: {str(error).splitlines()[0]}") from error
    if checked.type == "meta":
        raise ValueError("device must hold data, the meta device does not")
    return checked
