"""Whether this process is one of several that torch.distributed has brought together."""

from __future__ import annotations

import sys


def several_processes() -> bool:
    """Whether this process is a rank of a job of several. torch.distributed is not imported for the answer."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return False
    return bool(distributed.is_initialized() and distributed.get_world_size() > 1)
