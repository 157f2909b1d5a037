"""The N-th OS call of one of four ranks fails, and with it the save: all ranks say so in the same words. They go on, and save again."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from faults.beneath import Fate, Met, arm, disarm
from faults.rank_savers import Case, Options, RankBench, Result, attempt_save, from_all, in_a_job, save_template
from faults.savers import litter_in
from faults.scenarios import NO_ROOM, check_message, held, is_unlocked, may_pass, nothing_leaked
from shardsave._format.file_names import INDEX_NAME
from shardsave._storage.staging import NONCE_NAME


def fails(case: Case) -> int:
    """Each call of a rank fails in one way. Returns the number of trials."""
    return int(in_a_job(fails_on_a_rank, case))


def fails_on_a_rank(rank: int, case: Case) -> int:
    """Runs on all ranks."""
    if not case.first:
        save_template(rank, case)
    bench = RankBench(case, None if case.first else case.folder / "template")
    attempt_save(case.kind, 0, case.folder / "warm")
    for nth in case.calls():
        if rank == 0:
            bench.reset()
        dist.barrier()
        before = held()
        if rank == case.victim:
            arm(bench.watched, nth, case.fate, case.number)
        result = attempt_save(case.kind, 2, bench.target)
        met = disarm() if rank == case.victim else None
        assert nothing_leaked(before), (met, "leaked", before, held())
        results, met = from_all(result), from_all(met)[case.victim]
        if rank == 0:
            judge(bench, results, met, case)
        dist.barrier()
        after = attempt_save(case.kind, 9, bench.target, Options(durable=False))
        assert not after.error and not after.leftovers, (met, after)
        if rank == 0:
            assert bench.found() == 9 and not litter_in(bench.target), (met, litter_in(bench.target))
        if met is None:
            return nth
    raise AssertionError


def judge(bench: RankBench, results: list[Result], met: Met | None, case: Case) -> None:
    """All ranks have the same ``results``, which say what is in the directory."""
    assert len({(result.error, result.message) for result in results}) == 1, (met, results)
    error, message, leftovers, notes = results[0]
    found = bench.found()
    assert not bench.target.exists() or is_unlocked(bench.target), met
    if met is None:
        assert not error and not leftovers, (error, message, leftovers)
    elif case.fate is Fate.FAIL_FROM_HERE:
        judge_without_disk(bench, results[0], met, found)
    elif not error:
        assert found == 2
        assert case.fate is Fate.FAIL_AFTER or may_pass_on_a_rank(met, case, leftovers, notes), (met, "was swallowed")
    else:
        check_message(message, met, case.number)
        assert f"rank {case.victim}" in message or case.victim == 0, (met, message)
        if error == "DurabilityUncertainError":
            assert found == 2
        else:
            assert error == ("OutOfSpaceError" if case.number in NO_ROOM else "SaveNotCommittedError"), (error, message)
            assert "nothing was" in message and found == bench.old, (met, message)
            judge_names(bench.target, met)


def judge_names(target: Path, met: Met) -> None:
    """Nothing of the failed save is left, unless what failed was to remove it."""
    names = os.listdir(target) if target.exists() else []
    left = [name for name in names if name.startswith(".shardsave-")]
    assert not left or met.call in ("unlinkat", "openat", "rmdir"), (met, left)


def judge_without_disk(bench: RankBench, result: Result, met: Met, found: int | None) -> None:
    """As `save_loses_its_disk` of ``scenarios.py``."""
    if not result.error:
        assert found == 2 and (result.leftovers or met.call == "close"), (met, result)
    elif result.error == "DurabilityUncertainError":
        assert found == 2 or (found == bench.old and "cannot tell whether the save was committed" in result.message), result
    else:
        assert found == bench.old and "nothing was" in result.message, (met, result)


def may_pass_on_a_rank(met: Met, case: Case, leftovers: tuple[str, ...], notes: tuple[str, ...]) -> bool:
    if met.call == "close" and (met.path.name == NONCE_NAME or met.path.name.startswith(".shardsave-")):
        return True  # what a rank that does not lead has only read
    if (met.call == "stat" and met.path.name == INDEX_NAME) or met.call == "lstat":
        return True  # which ranks have saved the checkpoint that is replaced, and under which path: a save need not know
    report = type("Report", (), {"leftovers": leftovers, "notes": notes})
    return may_pass(met, case.fate, case.number, report)  # type: ignore[arg-type]
