"""The options of `engine.write`: how files are opened, and whether their writeback starts at once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from shardsave._common import backend, os_calls
from shardsave._common.sources import TensorSource
from shardsave._engine import engine
from shardsave._engine.blocks import blocks
from shardsave._engine.transfer import BLOCK_BYTES, Access

TENSOR = torch.arange(3_000_000, dtype=torch.int64)  # three blocks


def write(path: Path, *, access: Access, start_writeback: bool) -> bytes:
    """Writes `TENSOR` to a new file at ``path``; returns what the file holds."""
    plan = blocks(np.array([[0, 0, TENSOR.nbytes, 1]], dtype=np.int64), BLOCK_BYTES)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        engine.write(
            [descriptor],
            plan,
            [TensorSource.of(TENSOR)],
            access=access,
            start_writeback=start_writeback,
            tick=lambda _: None,
        )
    finally:
        os.close(descriptor)
    return path.read_bytes()[: TENSOR.nbytes]


@pytest.mark.parametrize("start_writeback", [False, True])
def test_writeback_is_told_apart_from_direct_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_writeback: bool
) -> None:
    """Catches a portable engine that takes direct access for a wish to start writeback."""
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(os_calls, "start_writeback", lambda _, offset, length: started.append((offset, length)))
    assert write(tmp_path / "file", access="direct", start_writeback=start_writeback) == TENSOR.numpy().tobytes()
    assert [offset for offset, _ in started] == ([0, BLOCK_BYTES, 2 * BLOCK_BYTES] if start_writeback else [])


@pytest.mark.parametrize("portable", [False, True])
def test_writeback_needs_direct_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    """Catches an option that one of the two engines would ignore."""
    if portable:
        monkeypatch.setattr(backend, "native", None)
    with pytest.raises(ValueError, match="start_writeback needs access='direct', not 'buffered'"):
        write(tmp_path / "refused", access="buffered", start_writeback=True)
    assert write(tmp_path / "file", access="buffered", start_writeback=False) == TENSOR.numpy().tobytes()
