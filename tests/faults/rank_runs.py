"""As ``runs.py``, for a manager of four ranks: they save a step, rank 0 removes the earlier ones, and a call of one of them meets a fate.

Each time every step that is committed is whole, the step that the policy keeps is committed, and the next manager leaves nothing else.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

import shardsave
from faults import savers
from faults.beneath import arm, disarm
from faults.rank_savers import (
    RANK_TIMEOUT,
    SIZE,
    Case,
    Lived,
    Result,
    from_all,
    in_a_job,
    lived,
    sharded_state,
)
from faults.runs import manager_of, steps_in
from faults.scenarios import held, nothing_leaked
from jobs import Job
from shardsave._runs.recorded import RECORD_NAME


def attempt_step(run: Path, step: int, asynchronous: bool) -> Result:
    """What a step of a new manager comes to, with the removal of all steps before it."""
    manager = shardsave.CheckpointManager(
        run,
        save_every=1,
        keep_last=1,
        asynchronous=asynchronous,
        max_shard_size=5000,
        rank_timeout=RANK_TIMEOUT,
        reuse=False,
        progress=False,
    )
    try:
        with manager:
            manager.step(step, sharded_state(step))
            assert manager.wait_removed(60)
    except shardsave.ShardSaveError as error:
        return Result(type(error).__name__, str(error))
    return Result()


def reset(case: Case) -> Path:
    """A run of two steps."""
    run = case.folder / "watched" / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    savers.copy_tree(case.folder / "template", run)
    return run


def save_steps(case: Case) -> None:
    for step in (1, 2):
        folder = case.folder / "template" / f"step-{step:08d}"
        shardsave.save(savers.state(step), folder, max_shard_size=5000, durable=False, progress=False)


def judge(run: Path, results: list[Result]) -> None:
    """All ``results`` are the same, and say which steps there are."""
    assert len({result[:2] for result in results}) == 1, results
    error, message = results[0][:2]
    steps = steps_in(run)
    assert steps[-1] in (2, 3), steps
    if error == "DurabilityUncertainError":
        assert steps[-1] == 3 or "cannot tell" in message, (steps, message)
    else:
        assert steps[-1] == (2 if error else 3), (steps, results)


def run_fails(case: Case) -> int:
    """Each call of a rank fails in one way. Returns the number of trials."""
    return int(in_a_job(run_fails_on_a_rank, case))


def run_fails_on_a_rank(rank: int, case: Case) -> int:
    """Runs on all ranks."""
    if rank == 0:
        save_steps(case)
    attempt_step(case.folder / "warm", 1, True)
    attempt_step(case.folder / "warm", 2, False)
    run = case.folder / "watched" / "run"
    for trial, nth in enumerate(case.calls()):
        if rank == 0:
            reset(case)
        dist.barrier()
        before = held()
        if rank == case.victim:
            arm(run.parent, nth, case.fate, case.number)
        result = attempt_step(run, 3, bool(trial % 2))
        met = disarm() if rank == case.victim else None
        assert nothing_leaked(before), (met, "leaked", before, held())
        results, met = from_all(result), from_all(met)[case.victim]
        if rank == 0:
            judge(run, results)
        dist.barrier()
        assert attempt_step(run, 4, False) == Result(), met
        if rank == 0:
            assert steps_in(run) == [4] and {*os.listdir(run)} == {"step-00000004", RECORD_NAME}, (met, os.listdir(run))
        if met is None and trial % 2 == 0:
            return nth
    raise AssertionError


def step_with_fate(rank: int, case: Case, run: Path, nth: int, asynchronous: bool) -> Lived:
    def strike() -> None:
        if rank == case.victim:
            arm(run.parent, nth, case.fate)

    return lived(partial(attempt_step, run, 3, asynchronous), strike)


def run_is_killed(case: Case) -> int:
    """The rank ends at each of its of the save and of the removal."""
    save_steps(case)
    for trial, nth in enumerate(case.calls()):
        run = reset(case)
        serves = "agent" if trial // 2 % 2 else "rank 0"
        with Job(SIZE, step_with_fate, case, run, nth, bool(trial % 2), store_in=serves) as job:
            ends = job.ended(60)
        living = [end for rank, end in enumerate(ends) if rank != case.victim]
        assert all(end.error is None and end.exit_code is None and not end.value[1] for end in living), ends
        results = [Result(*end.value[0]) for end in living]
        judge(run, results)
        assert not results[0].error or f"rank {case.victim}" in results[0].message, results
        manager_of(run).commit(9)
        assert steps_in(run) == [9] and {*os.listdir(run)} == {"step-00000009", RECORD_NAME}, (nth, os.listdir(run))
        if ends[case.victim].exit_code is None and trial % 2 == 0:
            return nth
    raise AssertionError
