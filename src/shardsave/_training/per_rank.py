"""Marks values of a training state that each rank has for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PerRank:
    """Marks ``value``, a leaf or a whole structure in ``training=``, as one that belongs to a rank, such as a data loader.

    With another number of ranks it is not filled, and the notes name it. Values without this mark are the same on all ranks.

    Example:
        >>> import shardsave
        >>> training = {"epoch": 3, "position": shardsave.PerRank(1200)}
    """

    value: Any
