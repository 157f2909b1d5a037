"""What the index of a step says about the step. The one place that knows where that stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardsave._format.index import Record

#: The key of the metadata that has the members until the index itself has them.
METADATA_KEY = "shardsave.step"


def members(step: int, metrics: Mapping[str, float], created: str) -> dict[str, Any]:
    """What a save records of a step, as JSON values."""
    return {
        METADATA_KEY: {"step": step, "metrics": {name: _plain(value) for name, value in metrics.items()}, "created": created}
    }


def described(record: Record) -> tuple[dict[str, float], str]:
    """The metrics of the step, and when it was saved; nothing and "" if the record does not say it."""
    noted = record.metadata.get(METADATA_KEY)
    if not isinstance(noted, dict):
        return {}, ""
    metrics, created = noted.get("metrics"), noted.get("created")
    numbers = {name: _number(value) for name, value in metrics.items()} if isinstance(metrics, dict) else {}
    return {name: value for name, value in numbers.items() if value is not None}, created if isinstance(created, str) else ""


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _number(value: object) -> float | None:
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
