"""Method: as in ``scenarios.py``, for a save by four ranks: the N-th OS call of one of them on the checkpoint's directory meets a fate.

Each time all ranks end with the same result, the directory holds the old or the new checkpoint, whole, and the next save leaves no litter.

``python -m faults.ranks SCENARIO,… first|overwrite RANK FOLDER``, with the library of ``beneath.c`` preloaded; the ranks inherit it.
``SHARDSAVE_EVERY``: only every so many calls are tried.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardsave
from faults.beneath import Fate, Met, arm, disarm
from faults.savers import Bench, earlier_for, generation_in, litter_in, next_save_works, state
from faults.scenarios import NO_ROOM, check_message, held, is_unlocked, may_pass, nothing_leaked
from jobs import Ended, Job
from shardsave._storage.staging import NONCE_NAME

SIZE = 4
EVERY = int(os.environ.get("SHARDSAVE_EVERY", "1"))

#: Without a sign of life for so long, in seconds, a rank is lost.
RANK_TIMEOUT = 3.0


class Result(NamedTuple):
    """What a save has come to on one rank: ``error``, the class, and ``message``; or the leftovers and notes of a report."""

    error: str = ""
    message: str = ""
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def sharded_state(generation: int) -> dict[str, torch.Tensor]:
    """The tensors of `savers.state`: rows on each rank, columns or the whole on all."""
    mesh = init_device_mesh("cpu", (SIZE,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if name != "t1" else tensor
        for name, tensor in state(generation).items()
    }


def save_together(tensors: dict[str, torch.Tensor], folder: Path, durable: bool = True) -> Result:
    """The result of a save by all ranks. What the commit removes is freed before it returns."""
    try:
        report = shardsave.save(
            tensors,
            folder,
            max_shard_size=5000,
            durable=durable,
            progress=False,
            rank_timeout=RANK_TIMEOUT,
            reuse=earlier_for(folder),
        )
    except (shardsave.ShardSaveError, TypeError, ValueError) as error:
        return Result(type(error).__name__, str(error))
    assert report.wait_cleaned(60)
    return Result(leftovers=report.leftovers, notes=report.notes)


def from_all(value: object) -> list[object]:
    values: list[object] = [None] * SIZE
    dist.all_gather_object(values, value)
    return values


def fails_on_a_rank(rank: int, folder: Path, first: bool, victim: int, fate: Fate, number: int) -> int:
    """Each call of ``victim`` fails in one way. Runs on all ranks; returns the number of trials."""
    bench = Bench(folder, first) if rank == 0 else None
    target = folder / "watched" / "runs" / "ckpt"
    save_together(sharded_state(0), folder / "warm")
    for nth in count(1, EVERY):
        if bench is not None:
            bench.reset()
        dist.barrier()
        tensors = sharded_state(2)
        before = held()
        if rank == victim:
            arm(folder / "watched", nth, fate, number)
        result = save_together(tensors, target)
        met = disarm() if rank == victim else None
        assert nothing_leaked(before), (met, "leaked", before, held())
        results, mets = from_all(result), from_all(met)
        if bench is not None:
            judge(bench, results, mets[victim], fate, number)  # type: ignore[arg-type]
        dist.barrier()
        after = save_together(sharded_state(9), target, durable=False)
        assert after == Result(), after
        if bench is not None:
            assert generation_in(target) == 9 and not litter_in(target), litter_in(target)
        if mets[victim] is None:
            return nth
    raise AssertionError


def judge(bench: Bench, results: list[Result], met: Met | None, fate: Fate, number: int) -> None:
    """All ranks have the same ``results``, which say what is in the directory."""
    assert len({(result.error, result.message) for result in results}) == 1, (met, results)
    error, message, leftovers, notes = results[0]
    found = bench.found()
    assert not bench.target.exists() or is_unlocked(bench.target), met
    if met is None:
        assert not error and not leftovers, (error, message, leftovers)
    if not error:
        assert found == 2
        assert met is None or fate is Fate.FAIL_AFTER or may_pass_on_a_rank(met, fate, number, leftovers, notes), (
            met,
            "was swallowed",
        )
        return
    assert met is not None
    check_message(message, met, number)
    if error == "DurabilityUncertainError":
        assert found == 2
    else:
        assert error == ("OutOfSpaceError" if number in NO_ROOM else "SaveNotCommittedError"), (error, message)
        assert "nothing was" in message and found == bench.old, (met, message)
        names = os.listdir(bench.target) if bench.target.exists() else []
        assert not [name for name in names if name.startswith(".shardsave-")] or met.call in ("unlinkat", "openat", "rmdir"), (
            names
        )


def may_pass_on_a_rank(met: Met, fate: Fate, number: int, leftovers: tuple[str, ...], notes: tuple[str, ...]) -> bool:
    if met.call == "close" and (met.path.name == NONCE_NAME or met.path.name.startswith(".shardsave-")):
        return True  # what a rank that does not lead has only read
    report = type("Report", (), {"leftovers": leftovers, "notes": notes})
    return may_pass(met, fate, number, report)  # type: ignore[arg-type]


def in_a_job(scenario: Callable[..., int], *arguments: object) -> int:
    with Job(SIZE, scenario, *arguments) as job:
        ends = job.ended(float(os.environ.get("SHARDSAVE_SECONDS", "300")))
    failed = [f"rank {rank}: {end.trace or end}" for rank, end in enumerate(ends) if end.error or end.exit_code is not None]
    assert not failed, "\n".join(failed)
    return int(ends[0].value)


def fails(folder: Path, first: bool, victim: int, fate: Fate, number: int) -> int:
    return in_a_job(fails_on_a_rank, folder, first, victim, fate, number)


def save_with_fate(rank: int, target: Path, watched: Path, victim: int, nth: int, fate: Fate) -> Result:
    tensors = sharded_state(2)
    (watched / f"rank-{rank}").touch()
    if rank == victim:
        arm(watched, nth, fate)
    return save_together(tensors, target)


def is_killed(folder: Path, first: bool, victim: int, fate: Fate, number: int) -> int:
    """``victim`` ends at each of its calls. All others are told by one error, which says what is in the directory."""
    bench = Bench(folder, first)
    for nth in count(1, EVERY):
        bench.reset()
        serves = "agent" if nth // EVERY % 2 else "rank 0"  # in the second case the store dies with rank 0
        with Job(SIZE, save_with_fate, bench.target, bench.watched, victim, nth, fate, store_in=serves) as job:
            ends = job.ended(60)
        judge_loss(bench, ends, victim)
        next_save_works(bench.target)
        if ends[victim].exit_code is None:
            return nth
    raise AssertionError


def is_killed_at_random(folder: Path, first: bool, victim: int, fate: Fate, number: int) -> int:
    """A rank gets a SIGKILL at a random moment, or a SIGSTOP, after which it is as silent as one whose network is cut."""
    chance = random.Random(victim)
    bench = Bench(folder, first)
    kills = int(os.environ.get("SHARDSAVE_RANK_KILLS", "20"))
    seconds = 0.1
    for trial in range(kills):
        bench.reset()
        lost = chance.randrange(SIZE)
        with Job(SIZE, save_with_fate, bench.target, bench.watched, -1, 0, Fate.PASS) as job:
            while not all((bench.watched / f"rank-{rank}").exists() for rank in range(SIZE)):
                time.sleep(0.001)
            time.sleep(chance.random() * seconds)
            stops = trial % 10 == 9
            job.kill(lost, signal.SIGSTOP if stops else signal.SIGKILL)
            others = [rank for rank in range(SIZE) if rank != lost]
            ends = {rank: end for rank, end in zip(others, job.ended(30, others))}
            if stops:
                job.kill(lost)
            ends[lost] = job.ended(30, [lost])[0]
        judge_loss(bench, [ends[rank] for rank in range(SIZE)], lost)
        seconds *= 0.8 if bench.found() == 2 else 1.25
        next_save_works(bench.target)
    return kills


def judge_loss(bench: Bench, ends: list[Ended], lost: int) -> None:
    """The ranks that live have the same result, which names ``lost`` and says what is in the directory."""
    living = [end for rank, end in enumerate(ends) if rank != lost]
    assert all(end.error is None and end.exit_code is None for end in living), ends
    results = {Result(*end.value)[:2] for end in living}
    found = bench.found()
    assert found in (bench.old, 2) and len(results) == 1, (results, found)
    error, message = results.pop()
    if not error:
        assert found == 2, ends
        return
    assert f"rank {lost}" in message, message
    if error == "DurabilityUncertainError":
        assert found == 2 or "cannot tell" in message, (message, found)
    else:
        assert error == "SaveNotCommittedError" and found == bench.old and "nothing was" in message, (error, message, found)


SCENARIOS: dict[str, tuple[Callable[[Path, bool, int, Fate, int], int], list[tuple[Fate, int]]]] = {
    "fails": (fails, [(Fate.FAIL, errno.EIO), (Fate.FAIL, errno.ENOSPC), (Fate.FAIL_AFTER, errno.EIO)]),
    "is_killed": (is_killed, [(Fate.KILL, 0)]),
    "is_killed_at_random": (is_killed_at_random, [(Fate.PASS, 0)]),
}


def main(names: str, before: str, victim: str, folder: str) -> None:
    failed = 0
    for name in names.split(","):
        scenario, fates = SCENARIOS[name]
        for fate, number in fates:
            place = Path(folder) / f"{name}-{fate.name}-{number}"
            place.mkdir()
            try:
                result = f"{scenario(place, before == 'first', int(victim), fate, number)} trials"
            except Exception:
                failed += 1
                result = f"FAILED\n{traceback.format_exc()}"
            print(f"{name}, {fate.name} {errno.errorcode.get(number, '')}: {result}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
