"""Saves by several ranks beside their training: the checkpoint is of the moment of the call."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from placements import PLACEMENTS
from test_save import SIZE, same_files

import shardsave
from jobs import run_ranks

NAMES = ["rows", "columns", "hybrid", "fused_and_strided", "the_same_on_all"]


def save_and_go_on(rank: int, folder: Path) -> list[str]:
    modes = []
    for name in NAMES:
        whole, placed = PLACEMENTS[name]()
        if rank == 0:
            shardsave.save(whole, folder / name / "one", max_shard_size=SIZE)
        group = dist.group.WORLD if name == "the_same_on_all" else None
        pending = shardsave.save_async(placed, folder / name / "many", max_shard_size=SIZE, process_group=group)
        with torch.no_grad():
            for parameter in placed.parameters():
                parameter.mul_(2)
        modes.append(pending.wait(60).staging)
    return modes


def test_the_moment_of_the_call(tmp_path: Path) -> None:
    """Catches a tensor that is read after the call, a copy in the wrong place, and a session that one thread cannot hand to another."""
    assert run_ranks(4, save_and_go_on, tmp_path) == [["snapshot"] * len(NAMES)] * 4
    for name in NAMES:
        same_files(tmp_path / name / "one", tmp_path / name / "many")


def errors(rank: int, folder: Path) -> list[str]:
    tensors, group = {"x": torch.ones(3)}, dist.group.WORLD
    found = []
    for options in ({"staging": "ring"}, {"if_busy": "never" if rank == 2 else "wait"}, {"max_shard_size": -1 if rank else 1}):
        try:
            shardsave.save_async(tensors, folder / "ckpt", process_group=group, **options)
        except ValueError as error:
            found.append(str(error))
    return found


def test_errors_in_the_call(tmp_path: Path) -> None:
    """Catches a wrong argument of one rank that the others wait for, or learn of only later."""
    ends = run_ranks(4, errors, tmp_path)
    assert len(ends[0]) == 3 and all(end == ends[0] for end in ends), ends
    assert "needs a save by one process" in ends[0][0] and "if_busy" in ends[0][1], ends[0]


def fails_later(rank: int, folder: Path) -> tuple[str, float]:
    def report(done: int, total: int) -> None:
        if rank == 1:
            raise RuntimeError("no progress")

    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    pending = shardsave.save_async(tensors, folder / "ckpt", process_group=group, progress=report, max_shard_size="256B")
    with contextlib.suppress(shardsave.SaveNotCommittedError):
        pending.wait(60)
    error = pending.exception()
    shardsave.save_async(tensors, folder / "ckpt", process_group=group).wait(60)
    return str(error), shardsave.load(folder / "ckpt")["a"].sum().item()


def test_errors_after_the_call(tmp_path: Path) -> None:
    """Catches a failure in the background of one rank that the others do not see, and a next save that does not work."""
    ends = run_ranks(4, fails_later, tmp_path)
    assert {end for end in ends} == {ends[0]} and "rank 1: RuntimeError: no progress" in ends[0][0] and ends[0][1] == 64


def skip_while_one_is_busy(rank: int, folder: Path) -> list[bool]:
    held = threading.Event()
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    first = shardsave.save_async(
        tensors, folder / "first", process_group=group, max_shard_size="256B", progress=lambda *_: held.wait(60) and None
    )
    skipped = shardsave.save_async(tensors, folder / "second", process_group=group, if_busy="skip").wait(60).skipped
    held.set()
    first.wait(60)
    return [skipped, shardsave.save_async(tensors, folder / "second", process_group=group, if_busy="skip").wait(60).skipped]


def test_all_skip_or_none(tmp_path: Path) -> None:
    """Catches ranks of which some skip a save and others make it."""
    assert run_ranks(4, skip_while_one_is_busy, tmp_path) == [[True, False]] * 4
