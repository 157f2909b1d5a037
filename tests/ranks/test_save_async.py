"""Saves by several ranks beside their training: the checkpoint is of the moment of the call."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from placements import PLACEMENTS
from test_save import SIZE, same_files

import shardsave
from jobs import Job, run_ranks
from shardsave._background import snapshot
from shardsave._ranks.session import Session

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


def counted(rank: int, folder: Path) -> list[int]:
    """How many values each of two calls tells other ranks, and receives."""
    counts = []
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    for training in (None, {"optimizer": optimizer}):
        calls: list[str] = []
        thread = threading.get_ident()

        def count(name: str, calls: list[str] = calls) -> object:
            real = getattr(Session, name)

            def call(*arguments: object) -> object:
                if threading.get_ident() == thread:
                    calls.append(name)
                return real(*arguments)

            return mock.patch.object(Session, name, call)

        with count("gather"), count("publish"):  # type: ignore[attr-defined]
            pending = shardsave.save_async(model, folder / "ckpt", process_group=dist.group.WORLD, training=training)
        pending.wait(60)
        counts.append(len(calls))
    return counts


def test_one_exchange_in_the_call(tmp_path: Path) -> None:
    """Catches a call that waits for other ranks more than once after it has met them."""
    assert run_ranks(4, counted, tmp_path) == [[2, 2]] * 4


def differing(rank: int, folder: Path) -> list[str]:
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(float(rank == 3))
    group, averages = dist.group.WORLD, {"mean": torch.tensor([float(rank)])}
    same = {"mean": torch.ones(1)}
    ends = []
    for training, rule in ((same, "raise"), (averages, "lowest_rank"), (averages, "raise")):
        pending = shardsave.save_async(
            model,
            folder / "ckpt",
            process_group=group,
            training=training,
            on_divergence=rule,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            averages["mean"].add_(1)
            model.bias.fill_(1.0)  # after the call
        try:
            ends.append(" ".join(pending.wait(60).notes))
        except shardsave.UnsupportedTensorError as error:
            ends.append(str(error))
    return ends


def test_replicas_of_the_moment_of_the_call(tmp_path: Path) -> None:
    """Catches replicas that are compared as they are later, or not at all, since that is done after the call."""
    ends = run_ranks(4, differing, tmp_path)
    assert all(end == ends[0] for end in ends), ends
    assert "cannot save 'bias'" in ends[0][0] and "rank 3 and rank 0 differ" in ends[0][0], ends[0]
    assert "of replicas, those of the lowest rank were saved: the training state's 'mean'" in ends[0][1], ends[0]
    assert "cannot save the training state's 'mean'" in ends[0][2], ends[0]
    assert shardsave.load(tmp_path / "ckpt")["bias"].tolist() == [1.0, 1.0]


def fits_on_some(rank: int, folder: Path, staging: str) -> tuple[str, bool, str]:
    lacking = mock.patch.object(snapshot, "borrow", side_effect=snapshot.NoRoom("1 GB of memory were expected"))
    tensors, group = {name: torch.full((64,), 1.0) for name in "abcd"}, dist.group.WORLD
    with lacking if rank == 2 else contextlib.nullcontext():
        try:
            pending = shardsave.save_async(
                tensors,
                folder / "ckpt",
                process_group=group,
                max_shard_size="256B",
                staging=staging,  # type: ignore[arg-type]
            )
        except shardsave.OutOfMemoryError as error:
            return "in the call", False, str(error)
    ended = pending.done()
    for tensor in tensors.values():
        tensor.zero_()
    try:
        return pending.wait(60).staging, ended, ""
    except shardsave.ShardSaveError as error:
        return type(error).__name__, False, str(error)


def test_a_snapshot_that_fits_on_some_ranks(tmp_path: Path) -> None:
    """Catches a rank that has no memory for a copy and stops the others, or one whose tensors are read after its call."""
    ends = run_ranks(4, fits_on_some, tmp_path, "auto")
    assert [end[0] for end in ends] == ["snapshot", "snapshot", "blocking", "snapshot"] and ends[2][1], ends
    assert all(tensor.eq(1).all() for tensor in shardsave.load(tmp_path / "ckpt").values())
    ends = run_ranks(4, fits_on_some, tmp_path, "snapshot")
    assert [end[0] for end in ends] == ["OutOfMemoryError", "OutOfMemoryError", "in the call", "OutOfMemoryError"], ends
    assert all("rank 2: cannot copy what is saved" in end[2] for end in ends), ends


def fails_later(rank: int, folder: Path) -> tuple[str, float]:
    def report(done: int, total: int) -> None:
        if rank == 1:
            raise RuntimeError("no progress")

    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    pending = shardsave.save_async(tensors, folder / "ckpt", process_group=group, progress=report, max_shard_size="256B")
    with contextlib.suppress(RuntimeError if rank == 1 else shardsave.SaveNotCommittedError):
        pending.wait(60)
    error = pending.exception()
    shardsave.save_async(tensors, folder / "ckpt", process_group=group).wait(60)
    return str(error), shardsave.load(folder / "ckpt")["a"].sum().item()


def test_errors_after_the_call(tmp_path: Path) -> None:
    """Catches a failure in the background of one rank that the others do not see, and a next save that does not work."""
    ends = run_ranks(4, fails_later, tmp_path)
    (told,) = {ends[rank] for rank in (0, 2, 3)}
    assert "rank 1: RuntimeError: no progress; nothing was committed" in told[0] and told[1] == 64
    assert ends[1] == ("no progress", 64)


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


def cancelled_by(rank: int, folder: Path, who: int) -> tuple[list[bool], str, float]:
    held, begun = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        begun.set()
        held.wait(60)

    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    shardsave.save(tensors, folder / "ckpt", process_group=group)
    tensors["a"].mul_(2)
    pending = shardsave.save_async(tensors, folder / "ckpt", process_group=group, max_shard_size="256B", progress=hold)
    assert begun.wait(60)
    dist.barrier()
    answers = [pending.cancel()] if rank == who else []
    held.set()
    with contextlib.suppress(shardsave.SaveCancelledError):
        pending.wait(60)
    answers.append(pending.cancel())
    error = pending.exception()
    assert isinstance(error, shardsave.SaveCancelledError), error
    dist.barrier()
    return answers, str(error), shardsave.load(folder / "ckpt")["a"].sum().item()


@pytest.mark.parametrize("who", [0, 2])
def test_cancel_on_one_rank(tmp_path: Path, who: int) -> None:
    """Catches a save that is cancelled on one rank and committed by the others, or that these wait for."""
    ends = run_ranks(4, cancelled_by, tmp_path, who)
    assert [end[0] for end in ends] == [[True, True] if rank == who else [False] for rank in range(4)], ends
    assert all(end[1:] == ends[0][1:] for end in ends) and f"rank {who}" in ends[0][1] and ends[0][2] == 64, ends
    assert len([*(tmp_path / "ckpt").iterdir()]) == 2


def cancelled_at_once(rank: int, folder: Path) -> list[str]:
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    ends = []
    for who in (0, 1, 2, 3):
        asked = threading.Event()
        pending = shardsave.save_async(
            tensors,
            folder / "ckpt",
            process_group=group,
            max_shard_size="256B",
            progress=lambda *_, asked=asked: asked.wait(60) and None,  # its vote comes later
        )
        if rank == who:
            assert pending.cancel()
        asked.set()
        with contextlib.suppress(shardsave.SaveCancelledError):
            pending.wait(60)
        ends.append(type(pending.exception()).__name__)
    return ends


def test_cancel_before_the_thread_runs(tmp_path: Path) -> None:
    """Catches a save that was cancelled so early that the other ranks are told of something else, or of nothing."""
    assert run_ranks(4, cancelled_at_once, tmp_path) == [["SaveCancelledError"] * 4] * 4


def cancelled_too_late(rank: int, folder: Path) -> tuple[bool, int]:
    held = threading.Event()
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    pending = shardsave.save_async(
        tensors,
        folder / "ckpt",
        process_group=group,
        max_shard_size="256B",
        progress=lambda *_: rank == 2 and held.wait(60) and None,
    )
    end = time.monotonic() + 60
    while rank == 1 and "commit" not in pending._flight._decision.values() and time.monotonic() < end:
        time.sleep(0.01)  # until it has told rank 0 that its files are there, while rank 2 is not ready
    cancelled = rank == 1 and pending.cancel()
    dist.barrier()
    held.set()
    return cancelled, pending.wait(60).shards


def test_no_cancel_after_the_vote(tmp_path: Path) -> None:
    """Catches a rank whose `cancel` returns True after its vote, although rank 0 commits."""
    assert run_ranks(4, cancelled_too_late, tmp_path) == [(False, 4)] * 4


def loses(rank: int, folder: Path) -> str:
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD

    def die(done: int, total: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    pending = shardsave.save_async(
        tensors, folder / "ckpt", process_group=group, max_shard_size="256B", progress=die, rank_timeout=5
    )
    with contextlib.suppress(shardsave.SaveNotCommittedError):
        pending.wait(60)
    return str(pending.exception())


def test_a_lost_rank(tmp_path: Path) -> None:
    """Catches a training that hangs, or fails outside of `wait`, since another rank has died in the background."""
    with Job(4, loses, tmp_path) as job:
        ends = job.ended()
    assert ends[1].exit_code == -signal.SIGKILL
    assert all("rank 1" in ends[rank].value and "nothing was committed" in ends[rank].value for rank in (0, 2, 3)), ends


def ends_with_the_process(rank: int, folder: Path) -> int:
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    shardsave.save_async(
        tensors, folder / "ckpt", process_group=group, max_shard_size="256B", progress=lambda *_: time.sleep(0.1 * rank)
    )
    threading._shutdown()  # as the interpreter does at its end
    return len(shardsave.load(folder / "ckpt"))


def test_the_end_of_the_process_waits(tmp_path: Path) -> None:
    """Catches a rank that ends before what all ranks save is committed."""
    assert run_ranks(4, ends_with_the_process, tmp_path) == [4] * 4
