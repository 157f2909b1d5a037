"""What the tests of several commands need."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardsave
from support import SmallModel


@pytest.fixture
def ckpt(tmp_path: Path, small_model: SmallModel) -> Path:
    """A checkpoint of four shards."""
    shardsave.save(small_model, tmp_path / "ckpt", max_shard_size=4000, metadata={"step": 7})
    return tmp_path / "ckpt"
