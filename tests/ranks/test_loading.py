"""`load_model` on several ranks: each fills its part of a sharded module, from files that anybody wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import shardsave
from jobs import run_ranks
from sharded import RANKS, SHARDINGS, Net, check_equal


def set_thresholds(small: bool) -> None:
    """``small``: tensors of some bytes are divided among ranks as tensors of megabytes are."""
    from shardsave._ranks import division

    if small:
        division.LONE_BYTES, division.COMMON_BYTES = 64, 100


def load_sharded(rank: int, folder: str, sharding: str, small: bool) -> list[shardsave.LoadReport]:
    set_thresholds(small)
    reports = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = Net(seed=1)
        SHARDINGS[sharding](net)
        if device == "meta":
            net.scratch = torch.full((3,), 1.0)
        before = [id(p) for p in net.parameters()]
        reports.append(shardsave.load_model(net, folder))
        assert device == "meta" or before == [id(p) for p in net.parameters()]
        check_equal(net, Net())
        assert net.head.weight is net.embed.weight and net.scratch.tolist() == [1.0] * 3
    return reports


@pytest.mark.parametrize("small", [False, True], ids=["together", "divided"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_shardings(sharding: str, small: bool, tmp_path: Path) -> None:
    """Catches an element that a rank does not get, a tie, flag or buffer that is lost, and bytes that are read more than once."""
    saved = shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    for reports in run_ranks(RANKS, load_sharded, str(tmp_path / "ckpt"), sharding, small):
        for report in reports:
            assert report.verified and report.ranks == RANKS and report.tensors == saved.tensors
            assert report.bytes == saved.bytes
