"""One of four ranks ends or stops during a save. The others are told by one error, which names it and says what is in the directory."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from faults.beneath import arm
from faults.rank_savers import (
    RANK_TIMEOUT,
    SHORT_TIMEOUT,
    SIZE,
    Case,
    Lived,
    Options,
    RankBench,
    Result,
    attempt_save,
    bench_of_jobs,
    in_a_job,
    lived,
)
from faults.savers import generation_in, litter_in, next_save_works
from faults.scenarios import is_unlocked
from jobs import Ended, Job

#: After every so many losses, ranks make the next save, not one process.
BY_RANKS = 8


def save_with_fate(rank: int, case: Case, target: Path, watched: Path, nth: int, rank_timeout: float = RANK_TIMEOUT) -> Lived:
    def strike() -> None:
        (watched / f"rank-{rank}").touch()
        if rank == case.victim and nth:
            arm(watched, nth, case.fate)

    return lived(partial(attempt_save, case.kind, 2, target, Options(rank_timeout=rank_timeout)), strike)


def save_again(rank: int, kind: str, target: Path) -> Result:
    return attempt_save(kind, 9, target, Options(durable=False))


def next_one_works(bench: RankBench, case: Case, trial: int) -> None:
    """The next save succeeds and leaves no litter."""
    if trial % BY_RANKS:
        next_save_works(bench.target)
        return
    after = in_a_job(save_again, case.kind, bench.target)
    assert not after.error and not after.leftovers, after
    assert bench.found() == 9 and not litter_in(bench.target), litter_in(bench.target)


def is_killed(case: Case) -> int:
    """The rank ends at each of its calls."""
    bench = bench_of_jobs(case)
    for trial, nth in enumerate(case.calls()):
        bench.reset()
        serves = "agent" if trial % 2 else "rank 0"  # in the second case the store dies with rank 0
        with Job(SIZE, save_with_fate, case, bench.target, bench.watched, nth, store_in=serves) as job:
            ends = job.ended(60)
        judge_loss(bench, ends, case.victim)
        next_one_works(bench, case, trial)
        if ends[case.victim].exit_code is None:
            return nth
    raise AssertionError


def is_stopped(case: Case) -> int:
    """The rank is stopped at each of its calls, and goes on when the others have given it up: it changes nothing any more."""
    bench = bench_of_jobs(case)
    others = [rank for rank in range(SIZE) if rank != case.victim]
    for nth in case.calls():
        bench.reset()
        with Job(SIZE, save_with_fate, case, bench.target, bench.watched, nth, SHORT_TIMEOUT) as job:
            ends = dict(zip(others, job.ended(60, others)))
            found = judge_loss(bench, [ends.get(rank, Ended()) for rank in range(SIZE)], case.victim)
            stopped = stands_still(job, case.victim)
            if case.victim:  # rank 0 would have the lock
                next_save_works(bench.target)
            if stopped:
                job.kill(case.victim, signal.SIGCONT)
            end = job.ended(60, [case.victim])[0]
        assert end.error is None and end.exit_code is None and not end.value[1], end
        judge_late(bench, Result(*ends[others[0]].value[0]), Result(*end.value[0]), 9 if case.victim else found)
        next_save_works(bench.target)
        if not stopped:
            return nth
    raise AssertionError


def stands_still(job: Job, rank: int) -> bool:
    """Waits until ``rank`` is stopped, or has ended. Returns whether it is stopped."""
    while not job._pipes[rank].poll(0.002):
        if Path(f"/proc/{job.processes[rank].pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
    return False


def judge_late(bench: RankBench, told: Result, late: Result, found: int | None) -> None:
    """``told``: what the others know; ``late``: what became of the rank that was stopped. ``found``: what was there when it went on."""
    assert not bench.target.exists() or is_unlocked(bench.target)
    now = generation_in(bench.target) if found == 9 else bench.found()
    if "cannot tell" in told.message:
        assert now in (bench.old, 2, 9) and late.error == "DurabilityUncertainError", (now, late)
    else:
        assert now == found, (now, found, late)
    assert told.error != "SaveNotCommittedError" or late.error == told.error, (told, late)


def is_killed_at_random(case: Case) -> int:
    """A rank gets a SIGKILL at a random moment, or a SIGSTOP, after which it is as silent as one whose network is cut."""
    seed = int(os.environ.get("SHARDSAVE_SEED", case.victim))
    chance = random.Random(seed)
    bench = bench_of_jobs(case)
    kills = int(os.environ.get("SHARDSAVE_RANK_KILLS", "20"))
    seconds = 0.1
    outcomes = set()
    for trial in range(kills):
        bench.reset()
        lost, stops = chance.randrange(SIZE), trial % 10 == 9
        timeout = SHORT_TIMEOUT if stops else RANK_TIMEOUT
        with Job(SIZE, save_with_fate, case, bench.target, bench.watched, 0, timeout) as job:
            while not all((bench.watched / f"rank-{rank}").exists() for rank in range(SIZE)):
                time.sleep(0.001)
            time.sleep(chance.random() * seconds)
            job.kill(lost, signal.SIGSTOP if stops else signal.SIGKILL)
            others = [rank for rank in range(SIZE) if rank != lost]
            ends = dict(zip(others, job.ended(60, others)))
            if stops:
                job.kill(lost)
            ends[lost] = job.ended(30, [lost])[0]
        found = judge_loss(bench, [ends[rank] for rank in range(SIZE)], lost)
        seconds *= 0.8 if found == 2 else 1.25
        outcomes.add(found)
        next_one_works(bench, case, trial)
    assert len(outcomes) == 2 or kills < 50, outcomes
    return kills


def judge_loss(bench: RankBench, ends: list[Ended], lost: int) -> int | None:
    """The ranks that live have left nothing and have the same result, which names ``lost`` and says what is in the directory.

    Returns the generation that is there.
    """
    living = [end for rank, end in enumerate(ends) if rank != lost]
    assert all(end.error is None and end.exit_code is None for end in living), ends
    assert all(not end.value[1] for end in living), living
    results = {Result(*end.value[0])[:2] for end in living}
    found = bench.found()
    told_late = [
        message for error, message in results if error == "DurabilityUncertainError" and "not all ranks were told" in message
    ]
    if found == 2 and told_late:  # rank 0 was lost while it told of the commit: some know of it, the others found it out
        results -= {("", "")}
    cannot_tell = {end for end in results if end[0] == "DurabilityUncertainError" and "cannot tell" in end[1]}
    if lost == 0 and found == bench.old and any("nothing was committed" in message for _, message in results):
        results -= cannot_tell  # the store died with rank 0: only who had not yet voted knows that nothing can be committed
    assert found in (bench.old, 2) and len(results) == 1, (results, found)
    error, message = results.pop()
    if not error:
        assert found == 2, ends
        return found
    assert f"rank {lost}" in message, message
    if error == "DurabilityUncertainError":
        assert found == 2 or "cannot tell" in message, (message, found)
    else:
        assert error == "SaveNotCommittedError" and found == bench.old and "nothing was" in message, (error, message, found)
    return found
