"""Where the time of a save or a load went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """Durations in seconds. A load has no sync; its commit sets freeze flags and runs the modules' own loading routines."""

    plan: float = 0.0
    transfer: float = 0.0
    sync: float = 0.0
    commit: float = 0.0
