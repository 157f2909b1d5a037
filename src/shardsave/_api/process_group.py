"""Checks the argument ``process_group``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_process_group(group: ProcessGroup | None) -> None:
    """Refuses a group of several processes. Raises TypeError, ValueError."""
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"process_group must be a group of torch.distributed or None, not {type(group).__name__}")
    if group.size() != 1:
        raise ValueError(f"process_group must have one process in this version of shardsave, it has {group.size()}")
