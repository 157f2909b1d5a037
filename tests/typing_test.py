"""Checked by mypy, never run: what the public functions take and give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import shardsave


def public_surface(model: torch.nn.Module) -> None:
    report = shardsave.save(model, "ckpt", max_shard_size="5GB", durable=True, metadata={"run": "7"}, progress=None)
    assert_type(report, shardsave.SaveReport)
    assert_type(report.bytes_per_second, float)
    assert_type(report.phases.sync, float)
    shardsave.save(
        {"x": np.zeros(3), "y": torch.zeros(2)}, Path("ckpt"), max_shard_size=10**9, progress=lambda done, total: None
    )
    assert_type(
        shardsave.load("ckpt", device="cuda:0", names=None, prefix="", verify=True, mmap=False), dict[str, torch.Tensor]
    )
    assert_type(
        shardsave.load_model(model, "ckpt", device=None, prefix="", strict=True, restore_frozen=True, verify=True),
        shardsave.LoadReport,
    )
    info = shardsave.inspect("ckpt")
    assert_type(info.frozen, frozenset[str] | None)
    assert_type(info.tensors["x"].dtype, torch.dtype)
    assert_type(shardsave.verify("ckpt").verified, bool | None)
