"""How many workers the C++ engine has, for each way to open files."""

from __future__ import annotations

import os

import pytest

from shardsave._engine.transfer import Access

native = pytest.importorskip("shardsave._native")


@pytest.mark.parametrize("access", ["auto", "buffered", "direct"])
def test_worker_count(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches too few workers for a device, which most of them wait for; and more workers than slots, or than can be of use."""
    from shardsave._engine.workers import worker_count

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert worker_count(access, with_device=True) == native.DEVICE_SLOTS == 16
    assert worker_count(access, with_device=False) == (1 if access == "buffered" else 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100)))
    assert worker_count(access, with_device=False) == native.SLOTS == 8
