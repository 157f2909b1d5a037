"""Ranks of one job that save without a group: those that all save into one directory are told what to do instead; others are left alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from test_failing_loads import raised
from torch import nn

import shardsave
from jobs import run_ranks
from shardsave._ranks import claims, lone_save
from shardsave._ranks.store_connection import StoreConnection

State = dict[str, torch.Tensor]


def state(rank: int) -> State:
    """What each rank alone has, as a stage of a pipeline."""
    return {f"layers.{rank}.weight": torch.full((4, 4), float(rank))}


def in_turn(rank: int, steps: Callable[[int], Any]) -> list[Any]:
    """What ``steps(0)``, …, ``steps(size - 1)`` return, each on the rank of its number, one after the other; on this rank."""
    done = []
    for turn in range(dist.get_world_size()):
        if turn == rank:
            done.append(steps(rank))
        dist.barrier()
    return done


def save_at_once(rank: int, folder: Path) -> tuple[str, str]:
    dist.barrier()
    return raised(lambda: shardsave.save(state(rank), folder, durable=False))


def test_ranks_that_all_save(tmp_path: Path) -> None:
    """Catches stages of a pipeline that replace one another in silence, and an error that does not say what to do."""
    ends = run_ranks(4, save_at_once, tmp_path)
    (winner,) = [rank for rank, (kind, _) in enumerate(ends) if not kind]
    for rank, (kind, message) in enumerate(ends):
        if rank != winner:
            assert kind == "SaveNotCommittedError"
            assert f"rank {winner} has just saved there and rank {rank} was about to replace that" in message
            assert "process_group=torch.distributed.group.WORLD" in message and f"of rank {winner} is intact" in message
    assert torch.equal(shardsave.load(tmp_path)[f"layers.{winner}.weight"], state(winner)[f"layers.{winner}.weight"])
    assert shardsave.verify(tmp_path).verified


def save_one_after_the_other(rank: int, folder: Path) -> list[Any]:
    """For each case: what rank 1 raised, or its notes, when it saved after rank 0."""
    outcomes = []
    for case, (steps, passed) in SEQUENCES.items():
        now = time.time
        clock = mock.patch.object(claims.time, "time", lambda passed=passed: now() + (passed if rank else 0.0))  # type: ignore[misc]

        def save(rank: int, case: str = case, steps: Any = steps) -> Any:
            notes: list[str] = []
            error = raised(
                lambda: notes.extend(shardsave.save(state(rank), folder / case, step=steps[rank], durable=False).notes)
            )
            return error, notes

        with clock:
            outcomes += in_turn(rank, save)
    return outcomes


#: Case → the steps of both ranks, and the seconds between their saves.
SEQUENCES: dict[str, tuple[tuple[int | None, int | None], float]] = {
    "at once": ((None, None), 0.5),
    "the same step": ((7, 7), 3600.0),
    "another step": ((7, 8), 0.5),
    "much later": ((None, None), 3600.0),
}


def test_ranks_that_save_one_after_the_other(tmp_path: Path) -> None:
    """Catches a stage that replaces another because its rank was slower, and errors for a rank that saves later, with good reason."""
    first, second = run_ranks(2, save_one_after_the_other, tmp_path)
    assert all(error == ("", "") and notes == [] for error, notes in first)
    outcomes = dict(zip(SEQUENCES, second, strict=True))
    for case in ("at once", "the same step"):
        assert "rank 0 has just saved there" in outcomes[case][0][1]
        assert "layers.0.weight" in shardsave.load(tmp_path / case)
    for case in ("another step", "much later"):
        error, notes = outcomes[case]
        assert error == ("", "") and "rank 0 of this job had saved the checkpoint that is replaced, this is rank 1" in notes[0]
        assert "layers.1.weight" in shardsave.load(tmp_path / case)


def save_while_another_does(rank: int, folder: Path) -> tuple[str, str]:
    """Rank 1 begins to save another step when rank 0 has the lock and has not committed yet."""
    begin, prepare = lone_save.lone_save, lone_save.LoneSave.prepare

    def begun(*arguments: Any) -> Any:
        job = begin(*arguments)
        dist.barrier()
        return job

    def prepared(*arguments: Any) -> Any:
        dist.barrier()  # this rank has the lock
        dist.barrier()  # the other one has begun
        return prepare(*arguments)

    if rank == 0:
        with mock.patch.object(lone_save.LoneSave, "prepare", prepared):
            return raised(lambda: shardsave.save(state(rank), folder, step=1, durable=False))
    dist.barrier()
    with mock.patch.object(lone_save, "lone_save", begun):
        return raised(lambda: shardsave.save(state(rank), folder, step=2, durable=False))


def test_saves_at_the_same_time(tmp_path: Path) -> None:
    """Catches a rank that replaces what another one saves at the same moment, because their steps differ."""
    first, (kind, message) = run_ranks(2, save_while_another_does, tmp_path)
    assert first == ("", "") and kind == "SaveNotCommittedError" and "rank 0 has just saved there" in message
    assert shardsave.inspect(tmp_path).step == 1


def save_rightly(rank: int, folder: Path) -> list[Any]:
    """What nobody should be told anything about."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardsave").addHandler(handler)
    notes: list[str] = []

    def save(path: Path, **options: Any) -> None:
        notes.extend(shardsave.save(state(rank), path, durable=False, **options).notes)

    for number in range(3):  # the usual training
        if rank == 0:
            save(folder / "of rank 0", step=number)
    dist.barrier()
    save(folder / f"of rank {rank}")  # each into its own
    dist.barrier()
    (folder / str(rank)).mkdir()
    with mock.patch.object(claims, "_key_of", lambda _: "the same path"):  # a local disk on each machine
        in_turn(rank, lambda rank: save(folder / str(rank) / "ckpt"))
    if rank == 1:
        save(folder / "gone")
    dist.barrier()
    if rank == 0:  # the claim of rank 1 is no longer that of the checkpoint that is there
        (folder / "gone" / "model.safetensors.index.json").unlink()
        save(folder / "gone")
    return [*notes, *records]


def test_saves_that_are_right(tmp_path: Path) -> None:
    """Catches false alarms: of one rank that saves again and again, of ranks with directories or disks of their own, of stale claims."""
    assert run_ranks(2, save_rightly, tmp_path) == [[], []]


def save_without_a_store(rank: int, folder: Path) -> tuple[list[str], int]:
    """The store does not answer: a call of it takes longer than a save waits. Also returns how many calls there were."""
    calls = []

    def hang(line: StoreConnection, key: str, value: bytes) -> None:
        calls.append(key)
        time.sleep(1)

    with mock.patch.object(claims, "_PATIENCE", 0.1), mock.patch.object(StoreConnection, "set", hang):
        for number in range(3):
            shardsave.save(state(rank), folder / f"{rank}-{number}", durable=False)
    return [*shardsave.load(folder / f"{rank}-2")], len(calls)


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    """Catches a save that fails, or that waits again and again, because the store of the job is gone."""
    for rank, (names, calls) in enumerate(run_ranks(2, save_without_a_store, tmp_path)):
        assert names == [f"layers.{rank}.weight"] and calls == 1


def save_in_the_background(rank: int, folder: Path) -> list[tuple[str, str]]:
    model = nn.Linear(4, 4)
    dist.barrier()
    first = raised(lambda: shardsave.save_async(model, folder / "ckpt", durable=False).wait())
    dist.barrier()
    manager = shardsave.CheckpointManager(folder / "run", save_every=10, durable=False)
    dist.barrier()
    second = raised(lambda: manager.save(10, model))
    dist.barrier()
    manager.close()
    return [first, second]


def test_in_the_background_and_with_a_manager(tmp_path: Path) -> None:
    """Catches ranks that are told nothing, or something else, when a manager or a save in the background is theirs alone."""
    for ends in zip(*run_ranks(3, save_in_the_background, tmp_path)):
        told = [message for kind, message in ends if kind]
        assert len(told) == 2 and all("process_group=torch.distributed.group.WORLD" in message for message in told), ends


def save_in_turns(rank: int, folder: Path) -> str:
    """Each rank has a manager of its own for one run; rank 1 comes after rank 0. Returns what rank 1 is told."""
    model = nn.Linear(4, 4)
    manager = shardsave.CheckpointManager(folder, save_every=10, durable=False)
    for turn in range(2):
        if turn == rank:
            told = raised(lambda: manager.save(10, model))
        dist.barrier()
    manager.close()
    return told[1]


def test_a_step_that_another_rank_has_saved(tmp_path: Path) -> None:
    """Catches a rank that is told of another process, and not that ranks which save together need a group."""
    first, second = run_ranks(2, save_in_turns, tmp_path)
    assert first == "" and "pass process_group=torch.distributed.group.WORLD on all ranks" in second
