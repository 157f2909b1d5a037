"""A run that several ranks share: rank 0 lists, decides and removes, and all save and resume the same steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import Net, check_equal, rows
from torch import nn

import shardsave
from jobs import run_ranks
from shardsave import CheckpointManager, PerRank
from support import raised

RANKS = 4

#: A signal comes to every rank, as from a scheduler.
ALL = -1


def manager_of(folder: Path, **options: Any) -> CheckpointManager[Any]:
    given = {"save_every": 2, "process_group": dist.group.WORLD, "rank_timeout": 30, "durable": False, "reuse": False}
    return CheckpointManager(folder / "run", **{**given, **options})


def plain(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def train_and_resume(rank: int, folder: Path, asynchronous: bool) -> dict[str, Any]:
    committed: list[int | None] = []
    net = Net(1)
    rows(net)
    options = {"process_group": None, "keep_last": 2, "asynchronous": asynchronous}
    with manager_of(folder, on_commit=lambda report: committed.append(report.step), **options) as manager:
        nothing = manager.resume(net)
        saved = [step for step in range(1, 8) if manager.step(step, net, training={"rank": PerRank(rank)}) is not None]
    fresh = Net(2)
    rows(fresh)
    with manager_of(folder, **options) as manager:
        resumed = manager.resume(fresh, training={"rank": PerRank(-1)})
        assert resumed is not None
        check_equal(fresh, Net(1))
        again = manager.step(8, fresh) is not None
    return {
        "nothing": nothing, "saved": saved, "committed": committed, "step": resumed.step, "own": resumed.values["rank"],
        "again": again,
    }  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_of_a_sharded_model(tmp_path: Path, asynchronous: bool) -> None:
    """Catches ranks that save different steps, list or remove steps beside rank 0, or resume from different ones."""
    ends = run_ranks(RANKS, train_and_resume, tmp_path, asynchronous)
    for rank, end in enumerate(ends):
        assert (end["nothing"], end["saved"], end["step"], end["own"], end["again"]) == (None, [2, 4, 6], 6, rank, True), end
        assert end["committed"] == ([2, 4, 6] if rank == 0 else [])
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-00000006", "step-00000008"]


def resume_over_corrupt(rank: int, folder: Path) -> tuple[Any, ...]:
    with manager_of(folder) as manager:
        for step in (2, 4, 6, 8):
            manager.step(step, plain(step))
    dist.barrier()
    if rank == 0:
        damage(next((folder / "run" / "step-00000006").glob("*.safetensors")))
        (folder / "run" / "step-00000008" / "model.safetensors.index.json").write_text("{")
    dist.barrier()
    with manager_of(folder) as manager:
        model = plain()
        resumed = manager.resume(model)
    assert resumed is not None
    refused = ""
    with manager_of(folder, on_corrupt="raise") as manager:
        try:
            manager.resume(model)
        except shardsave.CorruptCheckpointError as error:
            refused = str(error)
    with manager_of(folder) as manager:  # without a resume, an earlier step is there: only rank 0 looks
        message = ""
        try:
            manager.save(4, model)
        except shardsave.SaveNotCommittedError as error:
            message = str(error)
    return resumed.step, model.weight[0, 0].item(), len(resumed.notes), refused, message


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_all_pass_over_corrupt_steps_together(tmp_path: Path) -> None:
    """Catches a rank that takes another step than the rest, and what rank 0 alone refuses and the others wait for."""
    ends = run_ranks(RANKS, resume_over_corrupt, tmp_path)
    assert all(end == ends[0] for end in ends), ends
    step, value, notes, refused, message = ends[0]
    assert (step, value) == (4, 4.0) and notes >= 2 and "step-00000008" in refused and "cannot save step 4" in message, ends[0]


def save_by_time(rank: int, folder: Path) -> list[int]:
    """By a clock that goes on by a second in each step, but on other ranks by a day."""
    with manager_of(folder, save_every="3s") as manager:
        saved, now = [], 0.0
        manager._when.clock, manager._when._since = lambda: now, now
        for step in range(1, 9):
            now += 86400.0 if rank else 1.0
            if rank in (0, step % RANKS):  # the ranks are never in step
                time.sleep(0.05)
            if manager.step(step, plain()) is not None:
                saved.append(step)
    return saved


def test_time_is_that_of_rank_0(tmp_path: Path) -> None:
    """Catches ranks that decide by their own clocks, of which some would wait for others."""
    ends = run_ranks(RANKS, save_by_time, tmp_path)
    assert all(end == ends[0] for end in ends) and 1 <= len(ends[0]) <= 3, ends


def preempted(rank: int, folder: Path, struck: int, explicit: bool, asynchronous: bool) -> tuple[Any, ...]:
    with manager_of(folder, save_every=None, asynchronous=asynchronous) as manager:
        manager.save_on_signal(signal.SIGUSR1)
        saved, ended = [], None
        for step in range(1, 10):
            if struck in (rank, ALL) and step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            if explicit and step == 5:
                manager.save(step, plain())
                saved.append(step)
            elif manager.step(step, plain()) is not None:
                saved.append(step)
            if manager.preempted:
                ended = step
                break
            dist.barrier()  # as a training does
    keys = shardsave_keys()
    dist.barrier()
    return saved, ended, keys


def shardsave_keys() -> int:
    """How many keys of runs are left, once all ranks have closed their managers."""
    from torch.distributed.distributed_c10d import _get_default_store

    dist.barrier()
    return sum(b"/run/" in key for key in map(str.encode, _get_default_store().list_keys()))


@pytest.mark.parametrize(("struck", "asynchronous"), [(0, False), (2, False), (2, True), (ALL, False)])
def test_a_signal_on_any_rank(tmp_path: Path, struck: int, asynchronous: bool) -> None:
    """Catches a signal that only its own rank obeys, a last save too many, and keys that stay in the store."""
    ends = run_ranks(RANKS, preempted, tmp_path, struck, False, asynchronous)
    assert all(end == ends[0] for end in ends), ends
    saved, ended, keys = ends[0]
    assert len(saved) == 1 and saved == [ended] and ended in (4, 5) and keys == 0, ends[0]


def test_a_save_after_a_signal_is_the_last_one(tmp_path: Path) -> None:
    """Catches a `save` that some ranks take for the last one and others do not."""
    ends = run_ranks(RANKS, preempted, tmp_path, 9, True, False)
    assert all(end == ([5], None, 0) for end in ends), ends


def save_at_the_end(rank: int, folder: Path) -> bool:
    with manager_of(folder, save_every="1h") as manager:
        manager.save_on_signal(signal.SIGUSR1)
        manager.step(1, plain())
        if rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        manager.save(2, plain())
        return manager.preempted


def test_a_save_counts_as_the_last_one(tmp_path: Path) -> None:
    """Catches a save after the loop by which only rank 0 has obeyed the signal."""
    assert run_ranks(RANKS, save_at_the_end, tmp_path) == [True] * RANKS


def fail_and_try_again(rank: int, folder: Path) -> tuple[list[int], list[str], bool]:
    def no_room(done: int, total: int) -> None:
        if rank == 1 and len(errors) == 0:
            raise RuntimeError("no room")

    errors: list[str] = []
    saved = []
    model = nn.Sequential(*(plain() for _ in range(8)))
    with manager_of(folder, save_every="1h", progress=no_room, max_shard_size="64B") as manager:
        manager.save_on_signal(signal.SIGUSR1)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        for step in range(1, 6):
            try:
                if manager.step(step, model) is not None:
                    saved.append(step)
            except (RuntimeError, shardsave.SaveNotCommittedError) as error:
                errors.append(str(error))
            dist.barrier()
        return saved, errors, manager.preempted


def test_a_last_save_that_fails_is_tried_again(tmp_path: Path) -> None:
    """Catches a failed last save that counts on some ranks."""
    ends = run_ranks(RANKS, fail_and_try_again, tmp_path)
    for rank, (saved, errors, done) in enumerate(ends):
        words = "no room" if rank == 1 else "rank 1: RuntimeError: no room"
        assert saved == [3] and len(errors) == 1 and words in errors[0] and done, ends[rank]


def fail_after_the_commit(rank: int, folder: Path) -> tuple[str, list[int]]:
    def refuse(report: shardsave.SaveReport) -> None:
        if report.step == 2:
            raise RuntimeError("no upload")

    message, saved = "", []
    with manager_of(folder, on_commit=refuse, keep_last=1) as manager:
        for step in range(1, 5):
            try:
                if manager.step(step, plain()) is not None:
                    saved.append(step)
            except RuntimeError as error:
                message = str(error)
    return message, saved


def test_what_follows_a_commit_fails_on_rank_0_alone(tmp_path: Path) -> None:
    """Catches `on_commit` on other ranks, and ranks that do not save together any more after it has raised."""
    ends = run_ranks(RANKS, fail_after_the_commit, tmp_path)
    assert ends == [("no upload", [4]), *[("", [2, 4])] * (RANKS - 1)]
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000004"]


def resume_alone(rank: int, folder: Path) -> str:
    with manager_of(folder, rank_timeout=1.5) as manager:
        if rank == 1:
            try:
                manager.resume(plain())
            except shardsave.ShardSaveError as error:
                return str(error)
    return ""


def test_one_rank_alone_is_told_who_is_missing(tmp_path: Path) -> None:
    """Catches a resume on one rank that hangs, or does not say which ranks did not come."""
    _, message, *_ = run_ranks(RANKS, resume_alone, tmp_path)
    assert "resume from" in message and "rank" in message and "did not" in message, message


def wrong_on_one(rank: int, folder: Path) -> dict[str, tuple[str, str]]:
    """Rank 1 passes what is wrong; afterwards all save together."""
    wrong: dict[str, Any] = {"keep": 3} if rank == 1 else {}
    ends = {}
    for name, options in (
        ("blocking", {}),
        ("async", {"asynchronous": True}),
        ("skip", {"asynchronous": True, "if_busy": "skip"}),
    ):
        with manager_of(folder / name, **options) as manager:
            ends[f"{name}: resume"] = raised(lambda manager=manager: manager.resume(plain(), **wrong))
            ends[f"{name}: step"] = raised(lambda manager=manager: manager.step(2, plain(), **wrong))
            ends[f"{name}: metrics"] = raised(
                lambda manager=manager: manager.save(3, plain(), metrics={"loss": "low" if rank == 1 else 1})
            )
            not_due = raised(lambda manager=manager: manager.step(3, plain(), **wrong))
            ends[f"{name}: not due"] = not_due if rank == 1 else (not_due[0] or "TypeError", not_due[1] or "keywords of")
            ends[f"{name}: saved"] = ("", str(manager.step(4, plain()) is not None))
    return ends


def test_what_is_wrong_on_one_rank(tmp_path: Path) -> None:
    """Catches a wrong argument that its own rank alone raises, so that the others wait for it."""
    for name in ("blocking", "async", "skip"):
        (tmp_path / name).mkdir()
    words = {
        "resume": ("TypeError", "rank 1: keywords of resume were expected, not keep"),
        "step": ("TypeError", "rank 1: keywords of CheckpointManager or of save were expected, not keep"),
        "metrics": ("TypeError", "rank 1: "),
        "not due": ("TypeError", "keywords of"),
        "saved": ("", "True"),
    }
    for ends in run_ranks(RANKS, wrong_on_one, tmp_path):
        for case, (kind, message) in ends.items():
            expected = words[case.partition(": ")[2]]
            assert kind == expected[0] and message.startswith(expected[1]), (case, kind, message)


def decide_differently(rank: int, folder: Path) -> list[tuple[str, str]]:
    ends = []
    with manager_of(folder, save_every=None) as manager:
        if rank == 2:
            manager.save_on_signal(signal.SIGUSR1)
        ends.append(raised(lambda: manager.step(1, plain())))
    with manager_of(folder, save_every=2 + rank // 3) as manager:
        ends.append(raised(lambda: manager.step(1, plain())))
    with manager_of(folder, save_every="1h", phase_timeout=0.5) as manager:
        manager.step(1, plain())
        ends.append(raised(lambda: manager.step(2, plain())) if rank == 1 else ("", ""))  # rank 0 does not come
        dist.barrier()
    return ends


def test_ranks_that_decide_differently(tmp_path: Path) -> None:
    """Catches a signal, or an interval, of some ranks alone, for which the others are not ready; and a wait for rank 0 with no limit."""
    ends = run_ranks(RANKS, decide_differently, tmp_path)
    for end in ends:
        assert end[0] == (
            "ValueError",
            f"cannot save to {tmp_path / 'run'}: the same save_on_signal was expected on all ranks, it is not called on rank 0, called on "
            f"rank 2; nothing was written",
        )
        assert end[1][0] == "ValueError" and "save_every was expected on all ranks, it is 2 on rank 0, 3 on rank 3" in end[1][1]
