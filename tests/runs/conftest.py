"""Fixtures for the tests of runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, Any]]]:
    """``records(event)``: the facts of the log records of that event."""
    caplog.set_level(logging.DEBUG, "shardsave")
    return lambda event: [record.shardsave for record in caplog.records if record.shardsave["event"] == event]  # type: ignore[attr-defined]
