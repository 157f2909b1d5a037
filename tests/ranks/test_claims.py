"""Groups of one job that save into one directory apart from each other are told what to do instead; what is right is left alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from test_failing_loads import raised
from torch import nn

import shardsave
from jobs import run_ranks
from shardsave._ranks import claims
from shardsave._ranks.claims import Claims
from shardsave._ranks.store_connection import StoreConnection

State = dict[str, torch.Tensor]
Ranks = tuple[int, ...]

ALL: Ranks = (0, 1, 2, 3)
FIRST, SECOND, STAGES, LAST = (0, 1), (2, 3), (0, 1, 2), (3,)

_groups: dict[Ranks, Any] = {}


def make_groups() -> None:
    """One for each set of ranks, on all ranks."""
    for ranks in (ALL, FIRST, SECOND, STAGES):
        _groups[ranks] = dist.new_group(ranks)


def state(rank: int) -> State:
    """What each rank alone has, as a stage of a pipeline."""
    return {f"layers.{rank}.weight": torch.full((4, 4), float(rank))}


def save(rank: int, ranks: Ranks, folder: Path, **options: Any) -> tuple[tuple[str, str], list[str]]:
    """What these ranks raised and noted, as this one sees it. All ranks return when they are done."""
    notes: list[str] = []
    error = ("", "")
    if rank in ranks:
        options = {"process_group": _groups.get(ranks), "durable": False, **options}
        error = raised(lambda: notes.extend(shardsave.save(state(rank), folder, **options).notes))
    dist.barrier()
    return error, notes


@contextmanager
def passed(seconds: float) -> Iterator[None]:
    now = time.time
    with mock.patch.object(claims.time, "time", lambda: now() + seconds):  # type: ignore[attr-defined]
        yield


#: Case → who saves first and second, with which steps, and the seconds between.
SEQUENCES: dict[str, tuple[Ranks, Ranks, tuple[int | None, int | None], float]] = {
    "two groups at once": (FIRST, SECOND, (None, None), 0.5),
    "two groups at the same step": (FIRST, SECOND, (7, 7), 3600.0),
    "a lone stage at last": (STAGES, LAST, (3, 3), 0.5),
    "a lone stage at first": (LAST, STAGES, (None, 3), 0.5),
    "two groups at another step": (FIRST, SECOND, (7, 8), 0.5),
    "two groups much later": (FIRST, SECOND, (None, None), 3600.0),
    "a lone stage much later": (STAGES, LAST, (3, None), 3600.0),
    "one of all at once": (ALL, LAST, (3, 3), 0.5),
    "a group of all at once": (ALL, FIRST, (None, None), 0.5),
    "all after one": (LAST, ALL, (None, None), 0.5),
    "all after a group": (SECOND, ALL, (3, 3), 0.5),
}


def save_in_sequence(rank: int, folder: Path) -> dict[str, Any]:
    make_groups()
    ends = {}
    for case, (first, second, steps, seconds) in SEQUENCES.items():
        before = save(rank, first, folder / case, step=steps[0])
        with passed(seconds):
            ends[case] = before, save(rank, second, folder / case, step=steps[1])
    return ends


def words(ranks: Sequence[int]) -> str:
    return {FIRST: "ranks 0, 1", SECOND: "ranks 2, 3", STAGES: "ranks 0 to 2", LAST: "rank 3", ALL: "ranks 0 to 3"}[
        tuple(ranks)
    ]


def test_groups_that_save_one_after_the_other(tmp_path: Path) -> None:
    """Catches a group, or a stage by itself, that replaces what others have just saved in silence, an error that does not name both or is
    not raised on all ranks, and errors and notes where all is right."""
    by_rank = run_ranks(4, save_in_sequence, tmp_path)
    for case, (first, second, _, _) in SEQUENCES.items():
        assert all(by_rank[rank][case][0] == (("", ""), []) for rank in first), case
        (end,) = {repr(by_rank[rank][case][1]) for rank in second}
        (kind, message), notes = by_rank[second[0]][case][1]
        stored = {name for ranks in (first if kind else second,) for rank in ranks for name in state(rank)}
        assert set(shardsave.load(tmp_path / case)) == stored, case
        if set(first) < set(second):
            assert not kind and not notes, (case, end)
        elif "much" in case or "another" in case or set(second) < set(first):
            these = f"{'this is' if second == LAST else 'these are'} {words(second)}"
            assert not kind and len(notes) == 1, (case, end)
            assert f"{words(first)} of this job had saved the checkpoint that is replaced, {these}" in notes[0], end
        else:
            assert kind == "SaveNotCommittedError" and message.startswith(f"cannot save to {tmp_path / case}: "), (case, end)
            have, were = ("has" if first == LAST else "have"), ("was" if second == LAST else "were")
            assert f"{words(first)} {have} just saved there and {words(second)} {were} about to replace that" in message
            assert "process_group=" in message and f"the checkpoint of {words(first)} is intact" in message


def save_while_a_group_does(rank: int, folder: Path) -> tuple[str, str]:
    """The second group begins to save another step when the first one has the lock and has not committed yet."""
    make_groups()
    leaders = dist.new_group([0, 2])
    begin, check = Claims.begin, Claims.check

    def begun(of: Claims, step: Any) -> None:
        begin(of, step)
        dist.barrier(leaders)

    def checked(of: Claims, step: Any) -> list[str]:
        dist.barrier(leaders)  # this group has the lock
        dist.barrier(leaders)  # the other one has begun
        return check(of, step)

    if rank in FIRST:
        with mock.patch.object(Claims, "check", checked):
            return save(rank, FIRST, folder, step=1)[0]
    if rank == 2:
        dist.barrier(leaders)
    with mock.patch.object(Claims, "begin", begun):
        return save(rank, SECOND, folder, step=2)[0]


def test_groups_that_save_at_the_same_time(tmp_path: Path) -> None:
    """Catches a group that replaces what another one saves at the same moment, because their steps differ."""
    *first, one, other = run_ranks(4, save_while_a_group_does, tmp_path)
    assert first == [("", "")] * 2 and one == other and one[0] == "SaveNotCommittedError"
    assert "ranks 0, 1 have just saved there and ranks 2, 3 were about to replace that" in one[1]
    assert shardsave.inspect(tmp_path).step == 1


def save_rightly(rank: int, folder: Path) -> list[str]:
    """What nobody should be told anything about other ranks of the job. Returns what was told."""
    make_groups()
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardsave").addHandler(handler)
    told: list[tuple[tuple[str, str], list[str]]] = []
    own = FIRST if rank in FIRST else SECOND
    for number in (1, 1, 2):  # one directory, in place, a step twice
        told.append(save(rank, ALL, folder / "latest", step=number))
    for _ in range(2):  # a directory for each group
        told.append(save(rank, own, folder / str(own), step=1))
    (folder / f"disk of {rank}").mkdir()
    with mock.patch.object(claims, "_key_of", lambda _: "the same path"):  # a disk of its own for each group
        for ranks in (FIRST, SECOND, FIRST):
            told.append(save(rank, ranks, folder / f"disk of {ranks[0]}" / "ckpt"))
    options = {"process_group": _groups[own], "durable": False}
    pending = shardsave.save_async(state(rank), folder / str(own), step=2, **options)
    records += shardsave.save(state(rank), folder / str(own), step=2, **options).notes
    records += pending.wait(60).notes
    with shardsave.CheckpointManager(folder / f"run of {own}", save_every=1, keep_last=1, reuse=False, **options) as manager:
        for step in (1, 2):
            report = manager.step(step, state(rank))
            assert report is not None
            records += report.notes
    records += [words for error, notes in told for words in (*error, *notes)]
    return [words for words in records if "of this job" in words or "Error" in words]


def test_saves_that_are_right(tmp_path: Path) -> None:
    """Catches false alarms: of one group again and again, of groups with directories or disks of their own, in the background too."""
    assert run_ranks(4, save_rightly, tmp_path) == [[]] * 4


def count_calls(rank: int, folder: Path) -> list[list[str]]:
    """The calls of the store that claims made, for each save."""
    make_groups()
    calls: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(StoreConnection, name)

        def call(line: StoreConnection, *arguments: Any) -> Any:
            if line._prefix.startswith("shardsave/claims"):
                calls.append(name)
            return method(line, *arguments)

        return mock.patch.object(StoreConnection, name, call)

    ends = []
    with counted("peek"), counted("set"), counted("delete"), mock.patch.object(claims, "_MOST_CLAIMS", 2):
        for name in ("one", "one", "two", "three"):
            calls.clear()
            save(rank, ALL, folder / name)
            ends.append(list(calls))
    return ends


def test_how_often_the_store_is_asked(tmp_path: Path) -> None:
    """Catches ranks that all ask, a question where there is nothing to replace, and claims that are kept for ever."""
    first, *others = run_ranks(4, count_calls, tmp_path)
    assert first == [["set"], ["peek", "peek", "set"], ["set"], ["set", "delete"]] and others == [[[]] * 4] * 3


def save_without_a_store(rank: int, folder: Path) -> tuple[list[str], int]:
    """The store does not answer claims: a call of it takes longer than a save waits. Also returns how many calls there were."""
    make_groups()
    calls = []
    set_key = StoreConnection.set

    def hang(line: StoreConnection, key: str, value: bytes) -> None:
        if not line._prefix.startswith("shardsave/claims"):
            return set_key(line, key, value)
        calls.append(key)
        return time.sleep(1)

    with mock.patch.object(claims, "_PATIENCE", 0.1), mock.patch.object(StoreConnection, "set", hang):
        ends = [save(rank, ALL, folder) for _ in range(3)]
    assert ends == [(("", ""), [])] * 3, ends
    return [*shardsave.load(folder)], len(calls)


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    """Catches a save that fails, or that waits again and again, because the store does not answer to what it could do without."""
    ends = run_ranks(4, save_without_a_store, tmp_path)
    assert [len(names) for names, _ in ends] == [4] * 4 and [calls for _, calls in ends] == [1, 0, 0, 0]


def save_in_other_ways(rank: int, folder: Path) -> list[tuple[str, str]]:
    """The second group saves after the first one, in the background, and with a manager."""
    make_groups()
    own = FIRST if rank in FIRST else SECOND
    group, model = _groups[own], nn.Linear(4, 4)
    ends = []
    with shardsave.CheckpointManager(folder / "run", save_every=1, process_group=group, durable=False, reuse=False) as manager:
        for call in (
            lambda: shardsave.save_async(state(rank), folder / "ckpt", process_group=group, durable=False).wait(60),
            lambda: manager.step(1, model),
        ):
            for turn in (FIRST, SECOND):
                if turn == own:
                    ends.append(raised(call))
                dist.barrier()
    return ends


def test_other_ways_to_save(tmp_path: Path) -> None:
    """Catches groups that are told nothing, or of another process, by a save in the background or a manager."""
    ends = run_ranks(4, save_in_other_ways, tmp_path)
    assert ends[0] == ends[1] == [("", "")] * 2 and ends[2] == ends[3], ends
    for kind, message in ends[2]:
        assert (
            kind == "SaveNotCommittedError"
            and "ranks 0, 1 have just saved there and ranks 2, 3 were about to replace that" in message
        ), ends[2]


def save_beside_a_stage(rank: int, folder: Path) -> tuple[str, str]:
    """Rank 3 has no DTensor, and the others wait for it: the default group has all ranks."""
    if rank == 3:
        told = raised(lambda: shardsave.save(state(rank), folder, durable=False))
    else:
        told = raised(
            lambda: shardsave.save(state(rank), folder, durable=False, process_group=dist.group.WORLD, rank_timeout=1.5)
        )
    dist.barrier()
    return told


def test_a_stage_that_does_not_know_of_the_others(tmp_path: Path) -> None:
    """Catches ranks that wait for one that has saved by itself, and are not told so."""
    *ends, last = run_ranks(4, save_beside_a_stage, tmp_path)
    assert last == ("", "") and len({*ends}) == 1
    kind, message = ends[0]
    assert kind == "SaveNotCommittedError" and "rank 3 did not" in message
    assert "rank 3 has saved there without the others, and needed the same process_group=; nothing was committed" in message
