"""Saves by several ranks: the files are those that one process with the whole model writes."""

from __future__ import annotations

import contextlib
import filecmp
import io
import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import PLACEMENTS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import shardsave
from jobs import run_ranks
from shardsave._ranks import group as groups

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
    per_rank = run_ranks(4, save_placed, tmp_path, names, libraries=names != NAMES)
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


OPTIONS: dict[str, dict[str, Any]] = {
    "cast": {"dtype": "bfloat16"},
    "trainable": {"only": "trainable"},
    "one file": {"max_shard_size": "1GB"},
    "not durable": {"durable": False, "max_shard_size": SIZE},
}


def save_with_options(rank: int, folder: Path) -> None:
    for name, options in OPTIONS.items():
        whole, placed = PLACEMENTS["rows_and_columns"]()
        if rank == 0:
            shardsave.save(whole, folder / name / "one", **options)
        shardsave.save(placed, folder / name / "many", **options)


def test_options(tmp_path: Path) -> None:
    """Catches a cast, or a choice of tensors, that several ranks make in another way than one process."""
    run_ranks(4, save_with_options, tmp_path)
    for name in OPTIONS:
        same_files(tmp_path / name / "one", tmp_path / name / "many")


def stage(rank: int) -> dict[str, torch.Tensor]:
    """A stage of a pipeline: layers of its own, and embeddings that the first and the last one share."""
    tensors: dict[str, torch.Tensor] = {}
    if rank in (0, 3):
        tensors["embed.weight"] = nn.Parameter(torch.arange(40.0).view(10, 4))
    for number in (2 * rank, 2 * rank + 1):
        tensors[f"layers.{number}.weight"] = nn.Parameter(torch.full((8, 8), float(number)), requires_grad=number != 5)
    return tensors


def save_stages(rank: int, folder: Path) -> Any:
    return shardsave.save(stage(rank), folder / "ckpt", max_shard_size="512B", process_group=dist.group.WORLD).tensors


def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """Catches names that only one rank has and that are lost, or in an order in which layer 10 comes before layer 2; and flags."""
    assert run_ranks(4, save_stages, tmp_path) == [9] * 4
    loaded = shardsave.load(tmp_path / "ckpt")
    expected = {name: tensor for rank in range(4) for name, tensor in stage(rank).items()}
    assert list(shardsave.inspect(tmp_path / "ckpt").names) == ["embed.weight", *(f"layers.{n}.weight" for n in range(8))]
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert list(shardsave.inspect(tmp_path / "ckpt").frozen or ()) == ["layers.5.weight"]
    shardsave.verify(tmp_path / "ckpt")


def save_in_two_groups(rank: int, folder: Path) -> list[str]:
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, rank % 2)
    nn.init.zeros_(model.bias)
    reports = [shardsave.save(model, folder / str(rank % 2), process_group=groups[rank % 2], durable=False) for _ in range(3)]
    return [report.path for report in reports]


def test_groups_that_are_smaller_than_the_job(tmp_path: Path) -> None:
    """Catches keys or sockets of two groups that are mixed up, and ranks of a group that are taken for those of the job."""
    run_ranks(4, save_in_two_groups, tmp_path)
    for number in range(2):
        loaded = shardsave.load(tmp_path / str(number))
        assert (loaded["weight"] == number).all()


def save_of_two_kinds(rank: int, folder: Path) -> None:
    """Three ranks have DTensors on a mesh of all four, the last one has the same as plain tensors."""
    whole, mesh = torch.arange(64.0).reshape(8, 8), init_device_mesh("cpu", (4,))
    places = {"rows": (whole[2 * rank : 2 * rank + 2], Shard(0)), "whole": (whole, Replicate())}
    tensors = {
        name: whole.clone() if rank == 3 else DTensor.from_local(local.clone(), mesh, [placement], run_check=False)
        for name, (local, placement) in places.items()
    }
    shardsave.save(tensors, folder, process_group=dist.group.WORLD)


def test_tensors_that_only_some_ranks_have_as_dtensors(tmp_path: Path) -> None:
    """Catches a tensor that some ranks place on a mesh and others have as a plain one, which ended as an error without its name."""
    run_ranks(4, save_of_two_kinds, tmp_path)
    loaded = shardsave.load(tmp_path)
    assert all(torch.equal(loaded[name], torch.arange(64.0).reshape(8, 8)) for name in ("rows", "whole"))


def save_again(rank: int, folder: Path) -> tuple[list[str], list[str]]:
    _, placed = PLACEMENTS["rows"]()
    shardsave.save(placed, folder / "ckpt", max_shard_size=SIZE)
    with torch.no_grad():
        placed.head.weight.add_(1.0)  # type: ignore[operator,union-attr]
    report = shardsave.save(placed, folder / "ckpt", max_shard_size=SIZE)
    return sorted(report.removed), [*report.notes]


def test_overwriting(tmp_path: Path) -> None:
    """Catches files of the replaced checkpoint that stay, and reports that differ between ranks."""
    ends = run_ranks(4, save_again, tmp_path)
    assert ends[0][0] and all(end == ends[0] for end in ends)
    shardsave.verify(tmp_path / "ckpt")
    index = shardsave.inspect(tmp_path / "ckpt")
    assert {name for name in os.listdir(tmp_path / "ckpt") if name.endswith(".safetensors")} == {*index.shards}


def log_and_warn(rank: int, folder: Path) -> tuple[list[str], str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardsave").addHandler(handler)
    logging.getLogger("shardsave").setLevel(logging.INFO)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        shardsave.save({"x": torch.ones(4)}, folder / "ckpt", process_group=dist.group.WORLD, progress=True)
    return records, shown.getvalue()


def test_one_record_and_one_bar(tmp_path: Path) -> None:
    """Catches as many log records or progress bars as there are ranks."""
    ends = run_ranks(4, log_and_warn, tmp_path)
    assert [len(records) for records, _ in ends] == [1, 0, 0, 0]
    assert [bool(shown) for _, shown in ends] == [True, False, False, False]


def plan_and_save(rank: int, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    _, placed = PLACEMENTS["rows"]()
    plan = shardsave.plan_save(placed, folder / "ckpt", max_shard_size=SIZE)
    dist.barrier()
    shardsave.save(placed, folder / "ckpt", max_shard_size=SIZE)
    dist.barrier()
    planned = {file.name: file.bytes for file in plan.files}
    return planned, {name: (folder / "ckpt" / name).stat().st_size for name in os.listdir(folder / "ckpt")}


def test_plans(tmp_path: Path) -> None:
    """Catches a plan of several ranks that names other files, or lengths, than the save then writes."""
    for planned, written in run_ranks(4, plan_and_save, tmp_path):
        assert planned == written


def save_on_two_hosts(rank: int, folder: Path, names: list[str]) -> None:
    own = groups.this_host()
    with mock.patch.object(groups, "this_host", lambda: groups.Host(f"{own.key}{rank // 2}", f"host{rank // 2}")):
        save_placed(rank, folder, names)


def test_two_hosts(tmp_path: Path) -> None:
    """Catches a byte that changes on its way between hosts, where ranks share no memory, and files that one host writes alone."""
    names = ["rows_and_columns", "uneven", "hybrid", "fused_and_strided", "the_same_on_all"]
    run_ranks(4, save_on_two_hosts, tmp_path, names)
    for name in names:
        same_files(tmp_path / name / "one", tmp_path / name / "many")
