"""`verify` with a group: the ranks share the files, and all say the same."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from test_failing_loads import damage
from torch import nn

import shardsave
from jobs import Job, run_ranks
from shardsave._engine import engine
from shardsave._loading.read import TensorReader
from shardsave._ranks import group as groups
from support import raised

RANKS = 4

#: What is not the same in the report of one process.
OWN = {"staging_bytes": 0, "ranks": 0}


def checkpoint(folder: Path, **options: Any) -> Path:
    """Nine tensors in eight shards of different lengths, and an architecture with an extra tensor."""
    model = nn.Module()
    for number in range(9):
        model.register_parameter(f"t{number}", nn.Parameter(torch.arange(1000.0 + 100 * number)))
    model.register_buffer("scratch", torch.ones(100), persistent=False)
    shardsave.save(model, folder, max_shard_size="8kB", durable=False, architecture=True, **options)
    return folder


def outcomes(folder: Path, **options: Any) -> list[Any]:
    """What `verify` raises, or its report, with and without ``keep_going``."""
    found: list[Any] = []
    for keep_going in (False, True):
        try:
            report = shardsave.verify(folder, keep_going=keep_going, **options)
            found.append({**vars(report), "seconds": 0, "phases": None})
        except shardsave.ShardSaveError as error:
            found.append((type(error).__name__, str(error)))
    return found


def verify_together(rank: int, folders: list[Path]) -> list[tuple[Any, int]]:
    """For each of ``folders`` the outcomes, and how many bytes this rank has read."""
    found = []
    for folder in folders:
        moved = 0
        read = engine.read

        def counted(files: Any, planned: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal moved
            moved += int(planned.piece_bytes.sum())
            return read(files, planned, *arguments, **options)

        with mock.patch.object(engine, "read", counted):
            found.append((outcomes(folder, process_group=dist.group.WORLD), moved))
    return found


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def test_the_outcome_of_one_process(tmp_path: Path) -> None:
    """Catches damage that only the rank that reads it learns of, another message or report than that of one process, files that several
    ranks read or none, notes that are lost, and a report that does not say how many ranks there were."""
    folders = [checkpoint(tmp_path / name) for name in ("clean", "a bit", "bits", "missing", "cut", "extra", "document")]
    _, bit, bits, missing, short, extra, document = folders
    damage(bit, "t6", 900)
    for name in ("t1", "t4", "t5", "t8"):
        damage(bits, name, 4)
    (missing / shardsave.inspect(missing).tensors["t3"].shard).unlink()
    cut(short / shardsave.inspect(short).tensors["t7"].shard)
    with open(next(extra.glob("extra-*.tensors")), "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1")
    with open(next(document.glob("architecture-*.json")), "r+b") as file:
        file.write(b"\1")
    alone = [outcomes(folder) for folder in folders]
    together = run_ranks(RANKS, verify_together, folders)
    for number, folder in enumerate(folders):
        found = [rank[number][0] for rank in together]
        assert all(one == found[0] for one in found), folder.name
        (strict, kept), (expected, report) = found[0], alone[number]
        assert {**kept, **OWN} == {**report, **OWN}, folder.name
        assert (kept["ranks"], report["ranks"]) == (RANKS, 1)
        if isinstance(expected, tuple):
            assert strict[0] == expected[0] and strict[1].endswith(expected[1]), (
                folder.name
            )  # what opens it has the rank in front
        else:
            assert {**strict, **OWN} == {**expected, **OWN}
    clean = [rank[0][1] for rank in together]
    assert sum(clean) == 2 * alone[0][0]["bytes"] and min(clean) > 0.6 * max(clean)


def test_a_lone_file_and_an_empty_checkpoint(tmp_path: Path) -> None:
    """Catches ranks without a file that read one, or that hang."""
    shardsave.save(nn.Linear(4, 4), tmp_path / "one", durable=False)
    shardsave.save({}, tmp_path / "none", durable=False)
    shardsave.convert(tmp_path / "one", tmp_path / "one.safetensors", to="safetensors")
    folders = [tmp_path / "one", tmp_path / "none", tmp_path / "one.safetensors", tmp_path / "nothing"]
    alone = [outcomes(folder) for folder in folders]
    for found in run_ranks(3, verify_together, folders):
        for (outcome, _), expected in zip(found, alone, strict=True):
            if isinstance(expected[0], tuple):
                assert all(one[0] == other[0] and one[1].endswith(other[1]) for one, other in zip(outcome, expected))
            else:
                assert [{**one, **OWN} for one in outcome] == [{**one, **OWN} for one in expected]


def verify_on_two_hosts(rank: int, folder: Path) -> list[Any]:
    own = groups.this_host()
    with mock.patch.object(groups, "this_host", lambda: groups.Host(f"{own.key}{rank}", f"host{rank}")):
        return outcomes(folder, process_group=dist.group.WORLD)


def test_machines_are_named(tmp_path: Path) -> None:
    """Catches damage on the disk of one of several machines that nobody can find."""
    damage(checkpoint(tmp_path), "t6", 900)
    one, two = run_ranks(2, verify_on_two_hosts, tmp_path)
    assert one == two
    (kind, message), report = one
    assert kind == "CorruptCheckpointError"
    assert message in ("rank 0 (host0)", "rank 1 (host1)") or "host" in message.split(": ")[0]
    assert report["damaged"][0].message == message


def verify_wrongly(rank: int, folder: Path) -> list[tuple[str, str]]:
    group = dist.group.WORLD
    lonely: dict[str, Any] = {"process_group": group, "rank_timeout": 1.0}
    errors = [
        raised(lambda: shardsave.verify(folder, keep_going=rank == 1, process_group=group)),
        raised(lambda: shardsave.verify(7 if rank == 2 else folder, process_group=group)),  # type: ignore[arg-type]
        raised(lambda: shardsave.verify(folder, process_group="all")),  # type: ignore[arg-type]
        raised(lambda: shardsave.verify(folder, **lonely)) if rank == 0 else ("", ""),
    ]
    shardsave.verify(folder)  # alone: not collective
    return errors


def test_wrong_calls(tmp_path: Path) -> None:
    """Catches arguments that differ, ranks that do not come, and a call without a group that waits for others."""
    checkpoint(tmp_path)
    first, *others = run_ranks(3, verify_wrongly, tmp_path)
    assert all(other[:3] == first[:3] for other in others)
    (differ, path, group, lonely) = first
    assert differ[0] == "ValueError" and "cannot verify" in differ[1]
    assert "the same keep_going was expected on all ranks, it is False on rank 0, rank 2, True on rank 1" in differ[1]
    assert path[0] in ("TypeError", "ValueError") and "rank 2" in path[1]
    assert group[0] == "TypeError" and "process_group must be a group" in group[1]
    assert lonely[0] == "ShardSaveError" and "ranks 1, 2 did not" in lonely[1]


def end_in_verify(rank: int, folder: Path, keep_going: bool, number: signal.Signals) -> None:
    strike = mock.patch.object(TensorReader, "_transfer", lambda *_, **__: os.kill(os.getpid(), number))
    with strike if rank == 2 else nullcontext():
        shardsave.verify(folder, keep_going=keep_going, process_group=dist.group.WORLD, rank_timeout=2.0)


@pytest.mark.parametrize(("keep_going", "number"), [(False, signal.SIGKILL), (True, signal.SIGKILL), (True, signal.SIGSTOP)])
def test_a_rank_that_is_lost(keep_going: bool, number: signal.Signals, tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one that was killed or stopped, and a report that takes its loss for damage."""
    checkpoint(tmp_path)
    began = time.monotonic()
    with Job(RANKS, end_in_verify, tmp_path, keep_going, number) as job:
        ends = job.ended(ranks=[0, 1, 3])
    assert time.monotonic() - began < 60
    assert all(end.error == "ShardSaveError" and "rank 2 was lost" in end.message for end in ends), ends
