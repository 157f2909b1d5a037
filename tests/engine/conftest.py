"""The engine that a test runs on."""

from __future__ import annotations

import pytest

from shardsave._common import backend


@pytest.fixture(params=["native", "portable"])
def engine_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once on each engine."""
    name = str(request.param)
    if name == "portable":
        monkeypatch.setattr(backend, "native", None)
    elif backend.native is None:
        pytest.skip("the C++ engine is not built")
    return name
