"""The N-th OS call of one of four ranks fails while they resume, or that rank ends. All say so in the same words; the next resume works."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import shardsave
from faults.beneath import arm, disarm
from faults.rank_savers import (
    RANK_TIMEOUT,
    SIZE,
    Case,
    Lived,
    Options,
    RankBench,
    Result,
    attempt_save,
    bench_of_jobs,
    from_all,
    in_a_job,
    lived,
    own_value,
    save_template,
    training,
)
from faults.scenarios import check_message, held, is_unlocked, nothing_leaked
from jobs import Job


def attempt_resume(folder: Path) -> Result:
    """What a resume into a model and a training state of another generation comes to. Where it succeeds, everything is as it was saved."""
    model, state = training(5)
    try:
        resumed = shardsave.resume(folder, model, training=state, rng=True, rank_timeout=RANK_TIMEOUT, progress=False)
    except shardsave.ShardSaveError as error:
        return Result(type(error).__name__, str(error))
    optimizer = state["optimizer"]
    tensors = [t for p in model.parameters() for t in (p.detach(), optimizer.state[p]["momentum_buffer"])]
    assert all(bool((local(tensor) == 1).all()) for tensor in tensors), tensors
    assert resumed.step == resumed.values["epoch"] == 1 and resumed.values["own"] == own_value(1, dist.get_rank()), resumed
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())
    return Result(notes=resumed.notes)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def resume_fails(case: Case) -> int:
    """Each call of a rank fails in one way. Returns the number of trials."""
    return int(in_a_job(resume_fails_on_a_rank, case))


def resume_fails_on_a_rank(rank: int, case: Case) -> int:
    """Runs on all ranks."""
    bench = RankBench(case, case.folder / "template")
    save_template(rank, case)
    if rank == 0:
        bench.reset()
    dist.barrier()
    assert attempt_resume(bench.target) == Result()
    for nth in case.calls():
        before = held()
        dist.barrier()
        if rank == case.victim:
            arm(bench.watched, nth, case.fate, case.number)
        result = attempt_resume(bench.target)
        met = disarm() if rank == case.victim else None
        assert nothing_leaked(before), (met, "leaked", before, held())
        results, met = from_all(result), from_all(met)[case.victim]
        assert len({result[:2] for result in results}) == 1, (met, results)
        if result.error:
            assert met is not None, result
            check_message(result.message, met, case.number)
            assert f"rank {case.victim}" in result.message or case.victim == 0, (met, result)
        assert attempt_resume(bench.target) == Result(), met
        assert rank or is_unlocked(bench.target), met
        if met is None:
            return nth
    raise AssertionError


def resume_with_fate(rank: int, case: Case, target: Path, watched: Path, nth: int) -> Lived:
    def strike() -> None:
        if rank == case.victim:
            arm(watched, nth, case.fate)

    return lived(partial(attempt_resume, target), strike)


def resume_again(rank: int, target: Path) -> tuple[Result, Result]:
    """The result of a resume, and of a save after it."""
    return attempt_resume(target), attempt_save("training", 2, target, Options(durable=False))


def _without_state(result: Result) -> tuple[str, str]:
    """Each rank says what it has changed itself."""
    return result[0], result[1].partition(";")[0]


def resume_is_killed(case: Case) -> int:
    """The rank ends at each of its calls. The checkpoint is as it was."""
    bench = bench_of_jobs(case)
    bench.reset()
    for trial, nth in enumerate(case.calls()):
        with Job(
            SIZE, resume_with_fate, case, bench.target, bench.watched, nth, store_in="agent" if trial % 2 else "rank 0"
        ) as job:
            ends = job.ended(60)
        living = [end for rank, end in enumerate(ends) if rank != case.victim]
        assert all(end.error is None and end.exit_code is None and not end.value[1] for end in living), ends
        results = {_without_state(end.value[0]) for end in living}
        assert len(results) == 1, results
        error, message = results.pop()
        assert not error or (error == "ShardSaveError" and f"rank {case.victim}" in message), (error, message)
        assert bench.found() == 1 and is_unlocked(bench.target)
        if ends[case.victim].exit_code is None:
            assert not error
            assert in_a_job(resume_again, bench.target) == (Result(), Result()) and bench.found() == 2
            return nth
    raise AssertionError
