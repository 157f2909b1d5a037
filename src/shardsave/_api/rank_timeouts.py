"""How long a collective call waits for other ranks: the defaults of ``rank_timeout`` and ``phase_timeout``, in seconds."""

from __future__ import annotations

from typing import Any

from shardsave._api.arguments import check_timeout

#: Without a sign of life of another rank, and until all have made the call.
RANK_TIMEOUT = 120.0

#: For one phase of the call, in which all ranks give signs of life.
PHASE_TIMEOUT = 1800.0


def seconds(given: Any, default: float) -> float:
    """``given`` if it can be a limit; else ``default``: the ranks meet, and all learn that the argument is wrong."""
    return float(given) if isinstance(given, (int, float)) and given > 0 else default


def check_timeouts(rank_timeout: Any, phase_timeout: Any) -> None:
    """Raises TypeError or ValueError."""
    check_timeout(rank_timeout, "rank_timeout")
    check_timeout(phase_timeout, "phase_timeout")
