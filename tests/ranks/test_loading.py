"""`load_model` on several ranks: each fills its part of a sharded module, from files that anybody wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded import RANKS, SHARDINGS, Net, check_equal, rows, whole

import shardsave
from jobs import run_ranks
from support import same_state


def set_thresholds(small: bool) -> None:
    """``small``: tensors of some bytes are divided among ranks as tensors of megabytes are."""
    from shardsave._ranks import division, read_plan

    if small:
        division.LONE_BYTES, division.COMMON_BYTES, read_plan.RUN_BYTES = 64, 100, 200


def load_on_two_hosts(rank: int, folder: str) -> list[shardsave.LoadReport]:
    from shardsave._ranks import group

    host = group.this_host()._replace(key=str(rank // 2))
    with mock.patch.object(group, "this_host", return_value=host):
        return load_sharded(rank, folder)


def load_divided(rank: int, folder: str) -> list[shardsave.LoadReport]:
    set_thresholds(small=True)
    return load_sharded(rank, folder)


def load_sharded(rank: int, folder: str) -> list[shardsave.LoadReport]:
    reports = []
    for name, shard in SHARDINGS.items():
        for device in ("cpu", "meta"):
            with torch.device(device):
                net = Net(seed=1)
            shard(net)
            if device == "meta":
                net.scratch = torch.full((3,), 1.0)
            before = [id(p) for p in net.parameters()]
            reports.append(shardsave.load_model(net, folder))
            assert device == "meta" or before == [id(p) for p in net.parameters()], name
            check_equal(net, Net(), name)
            assert net.head.weight is net.embed.weight and net.scratch.tolist() == [1.0] * 3
    return reports


@pytest.mark.parametrize("load", [load_divided, load_on_two_hosts])
def test_shardings(load: Callable[[int, str], list[shardsave.LoadReport]], tmp_path: Path) -> None:
    """Catches an element that a rank does not get, a tie, flag or buffer that is lost, and bytes that are read more than once."""
    saved = shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    for reports in run_ranks(RANKS, load, str(tmp_path / "ckpt")):
        for report in reports:
            assert report.verified and report.ranks == RANKS and report.tensors == saved.tensors
            assert report.bytes == saved.bytes


def save_sharded(rank: int, folder: str) -> None:
    for name in WRITERS:
        net = Net()
        SHARDINGS[name](net)
        shardsave.save(net, f"{folder}/{name}", durable=False)


def load_rows(rank: int, folder: str) -> None:
    for name in WRITERS:
        net = Net(seed=1)
        rows(net)
        report = shardsave.load_model(net, f"{folder}/{name}")
        assert report.verified and report.ranks == dist.get_world_size(), name
        check_equal(net, Net(), name)


#: Shardings whose files others read.
WRITERS = ("rows", "columns", "rows over tensor parallel", "strided")


def test_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Catches files of four ranks that two ranks, a job of one or a process without a job do not read as they were."""
    run_ranks(RANKS, save_sharded, str(tmp_path))
    for size in (2, 1):
        run_ranks(size, load_rows, str(tmp_path))
    for name in WRITERS:
        net = Net(seed=1)
        assert shardsave.load_model(net, tmp_path / name).verified and same_state(net, Net()), name


def train_on(rank: int, folder: str) -> None:
    tokens = torch.arange(22)
    for name in ("rows", "CPU offload", "hybrid"):
        with torch.device("meta"):
            net = Net()
        net.scratch = torch.zeros(3)
        SHARDINGS[name](net)
        for _ in range(2):  # the second load finds the outermost parameters whole, as the forward pass has left them
            shardsave.load_model(net, folder)
            expected = Net()
            net.zero_grad()
            net(tokens).backward()
            expected(tokens).backward()
            for (of, parameter), wanted in zip(net.named_parameters(), expected.parameters()):
                assert (parameter.grad is None) == (wanted.grad is None), (name, of)
                if wanted.grad is not None:
                    torch.testing.assert_close(whole(parameter.grad), wanted.grad, msg=f"{name}: {of}")
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(1)
            assert torch.isfinite(net(tokens))


def test_training_goes_on(tmp_path: Path) -> None:
    """Catches parameters that FSDP does not know after a load: forward or backward then fail, or compute with old values."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    run_ranks(RANKS, train_on, str(tmp_path / "ckpt"))
