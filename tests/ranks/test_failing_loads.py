"""Loads on several ranks that fail: all ranks raise the same error, and say what is wrong and where."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from sharded import RANKS, Net, columns, rows
from test_loading import set_thresholds
from torch import nn

import shardsave
from jobs import Job, run_ranks
from shardsave._engine.transfer import TransferFault
from shardsave._ranks.load_job import LoadJob
from shardsave._storage.checkpoint import open_checkpoint

Raised = tuple[str, str]


def raised(call: Callable[[], object]) -> Raised:
    """The class and the message of what ``call`` raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def same_everywhere(function: Any, *arguments: Any) -> list[Raised]:
    """What all ranks have raised, one after the other: the same on all."""
    first, *others = run_ranks(RANKS, function, *arguments)
    assert all(other == first for other in others), [first, *others]
    return first  # type: ignore[no-any-return]


def load_damaged(rank: int, folder: str) -> list[Raised]:
    errors = []
    for sharding, small in ((columns, False), (rows, True)):
        set_thresholds(small)
        for number in (1, 2):
            net = Net(seed=1)
            sharding(net)
            errors.append(raised(lambda net=net, number=number: shardsave.load_model(net, f"{folder}/{number}")))  # type: ignore[misc]
    return errors


def damage(folder: Path, name: str, at: int) -> None:
    """Flips a bit of byte ``at`` of the stored tensor ``name``."""
    with open_checkpoint(folder) as checkpoint:
        located = checkpoint.tensors[name]
    with open(folder / located.shard, "r+b") as file:
        file.seek(located.offset + at)
        byte = file.read(1)[0]
        file.seek(located.offset + at)
        file.write(bytes([byte ^ 4]))


def test_damage(tmp_path: Path) -> None:
    """Catches a flipped bit in what one rank reads that the others do not learn of, and a message that names another tensor."""
    for number in (1, 2):
        shardsave.save(Net(), tmp_path / str(number), durable=False)
        damage(tmp_path / str(number), "down.weight", 600)
    damage(tmp_path / "2", "embed.weight", 3)
    for error, message in (errors := same_everywhere(load_damaged, str(tmp_path))):
        assert error == "CorruptCheckpointError" and " of 10 tensors" in message
    one, two, again, _ = (message for _, message in errors)
    assert all("tensor 'down.weight' has checksum" in message and "9 of 10" in message for message in (one, again))
    assert "; 1 more tensors are damaged" in two and "8 of 10" in two


def load_wrongly(rank: int, folder: str) -> list[Raised]:
    """Each rank in turn does something wrong."""
    errors = []
    for case in CASES:
        net: Any = Net(seed=1)
        path: Any = folder
        options: dict[str, Any] = {"rank_timeout": 60.0, "process_group": dist.group.WORLD}
        with ExitStack() as stack:
            if case == "another shape" and rank == 2:
                net.up = nn.Linear(16, 12)
            if case != "another shape":
                rows(net)
            if rank == 1 and case == "another prefix":
                options["prefix"] = "up."
            if rank == 3 and case == "a wrong argument":
                options["strict"] = "yes"
            if rank == 3 and case == "a wrong path":
                path = 5
            if rank == 2 and case == "no memory":
                lack = shardsave.OutOfMemoryError("cannot load: no memory")
                stack.enter_context(mock.patch("shardsave._loading.module_filler.check_free_memory", side_effect=lack))
            if rank == 1 and case == "an error of the disk":
                fault = TransferFault(0, "pread", 5, 4096, 512)
                stack.enter_context(mock.patch("shardsave._engine.engine.read", side_effect=fault))
            before = [_local(parameter).clone() for parameter in net.parameters()]
            errors.append(raised(lambda: shardsave.load_model(net, path, **options)))
        unchanged = all(torch.equal(_local(parameter), was) for parameter, was in zip(net.parameters(), before))
        assert unchanged or case == "an error of the disk", case
    return errors


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


CASES = {
    "another shape": ("IncompatibleCheckpointError", "rank 2", "up.weight [13, 16] on disk, [12, 16] in the module"),
    "another prefix": ("ValueError", "prefix", "rank 1 has prefix='up.'"),
    "a wrong argument": ("TypeError", "rank 3", "strict"),
    "a wrong path": ("ValueError", "rank 3", "5"),
    "no memory": ("OutOfMemoryError", "rank 2", "no memory"),
    "an error of the disk": ("ShardSaveError", "rank 1", "pread of 512 bytes at offset 4096: Input/output error"),
}


def test_errors_of_one_rank(tmp_path: Path) -> None:
    """Catches ranks that go on, hang or raise something else when one of them fails, and modules that have changed then."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    for (case, (kind, *words)), (error, message) in zip(
        CASES.items(), same_everywhere(load_wrongly, str(tmp_path / "ckpt")), strict=True
    ):
        assert error == kind and all(word in message for word in words), (case, error, message)


def load_strictly(rank: int, folder: str) -> tuple[Any, ...]:
    net = Net(seed=1)
    net.more = nn.Linear(2, 2)
    rows(net)
    try:
        shardsave.load_model(net, folder)
    except shardsave.IncompatibleCheckpointError as error:
        strict = str(error)
    report = shardsave.load_model(net, folder, strict=False)
    return strict, report.missing, report.unexpected


def test_differences(tmp_path: Path) -> None:
    """Catches differences that are not told as in one process, and shapes of parts instead of those of whole tensors."""
    source = Net()
    source.norm = nn.LayerNorm(8)  # type: ignore[assignment]
    source.other = nn.Linear(2, 1)
    shardsave.save(source, tmp_path / "ckpt", durable=False)
    for strict, missing, unexpected in run_ranks(RANKS, load_strictly, str(tmp_path / "ckpt")):
        assert "norm.weight [8] on disk, [16] in the module" in strict and "missing from the checkpoint: more.bias" in strict
        assert missing == ("more.bias", "more.weight") and unexpected == ("other.bias", "other.weight")


def wait_in_load(rank: int, folder: str, pipe_end: str) -> float:
    """Rank 2 waits before it reads, until it is killed."""
    net = Net(seed=1)
    columns(net)
    if rank == 2:
        wait = LoadJob.reader

        def reader(*arguments: Any, **options: Any) -> Any:
            Path(pipe_end).write_text(str(os.getpid()))
            time.sleep(600)
            return wait(*arguments, **options)

        LoadJob.reader = reader  # type: ignore[method-assign]
    shardsave.load_model(net, folder, rank_timeout=3.0)
    return 0.0


def test_a_rank_that_dies(tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one that was killed, or do not say which it is."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    with Job(RANKS, wait_in_load, str(tmp_path / "ckpt"), str(tmp_path / "ready")) as job:
        while not (tmp_path / "ready").exists() and job.processes[2].is_alive():
            time.sleep(0.01)
        job.kill(2, signal.SIGKILL)
        began = time.monotonic()
        ends = job.ended(ranks=[0, 1, 3])
    assert time.monotonic() - began < 30
    assert all(end.error == "ShardSaveError" and "rank 2" in end.message for end in ends), ends
