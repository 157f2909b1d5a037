"""Saves by several ranks: the files are those that one process with the whole model writes."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from placements import PLACEMENTS

import shardsave
from jobs import run_ranks

SIZE = "4kB"
NAMES = [name for name in PLACEMENTS if name != "low_rank_adapters"]


def same_files(one: Path, many: Path) -> None:
    """The two directories have the same names, and files of the same bytes."""
    names = sorted(os.listdir(one))
    assert sorted(os.listdir(many)) == names
    different = [name for name in names if not filecmp.cmp(one / name, many / name, shallow=False)]
    assert not different, different


def save_placed(rank: int, folder: Path, names: list[str]) -> list[shardsave.SaveReport]:
    reports = []
    for name in names:
        whole, placed = PLACEMENTS[name]()
        if rank == 0:
            shardsave.save(whole, folder / name / "one", max_shard_size=SIZE, metadata={"of": name})
        group = dist.group.WORLD if name == "the_same_on_all" else None
        reports.append(
            shardsave.save(placed, folder / name / "many", max_shard_size=SIZE, metadata={"of": name}, process_group=group)
        )
    return reports


@pytest.mark.parametrize("names", [NAMES, pytest.param(["low_rank_adapters"], marks=pytest.mark.slow)], ids=["all", "PEFT"])
def test_every_placement(tmp_path: Path, names: list[str]) -> None:
    """Catches a byte that differs from the file of one process: a box in the wrong place, a tie, a flag, an order, a sum."""
    per_rank = run_ranks(4, save_placed, tmp_path, names)
    for name, *reports in zip(names, *per_rank):
        same_files(tmp_path / name / "one", tmp_path / name / "many")
        shardsave.verify(tmp_path / name / "many")
        first = reports[0]
        for report in reports:
            assert (report.bytes, report.tensors, report.shards, report.bytes_written) == (
                first.bytes,
                first.tensors,
                first.shards,
                first.bytes,
            )
