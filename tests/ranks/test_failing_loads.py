"""Loads on several ranks that fail: all ranks raise the same error, and say what is wrong and where."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded import RANKS, Net, check_equal, columns, rows
from test_loading import set_thresholds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import shardsave
from jobs import Job, run_ranks
from shardsave._engine.transfer import TransferFault
from shardsave._ranks import group as groups
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.open_checkpoint import open_checkpoint
from support import raised

Raised = tuple[str, str]


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
    """Catches a flipped bit in what one rank reads that the others do not learn of, and a message that names another tensor, no file, or a
    rank, as if it were at fault: all have found the damage, in files that all have read."""
    for number in (1, 2):
        shardsave.save(Net(), tmp_path / str(number), durable=False)
        damage(tmp_path / str(number), "down.weight", 600)
    damage(tmp_path / "2", "embed.weight", 3)
    for error, message in (errors := same_everywhere(load_damaged, str(tmp_path))):
        assert error == "CorruptCheckpointError" and " of 10 tensors" in message
        assert re.match(r"corrupt shard model-0000.-of-00002\.safetensors: tensor '", message) and "rank" not in message
    one, two, again, _ = (message for _, message in errors)
    assert all("tensor 'down.weight' has checksum" in message and "9 of 10" in message for message in (one, again))
    assert "; 1 more tensor is damaged" in two and "8 of 10" in two


def load_damaged_on_one_host(rank: int, folder: str) -> Raised:
    """Ranks 2 and 3 are on another host, with files of its own under the same path."""
    net, of_host = Net(seed=1), rank // 2
    columns(net)
    os.chdir(f"{folder}/{of_host}")
    with mock.patch.object(groups, "this_host", lambda: groups.Host(f"host{of_host}", f"machine{of_host}")):
        return raised(lambda: shardsave.load_model(net, "ckpt"))


def test_damage_on_one_of_several_hosts(tmp_path: Path) -> None:
    """Catches damage of a file that several machines have, each a copy, of which nobody can tell on which of them it is."""
    for number in (0, 1):
        shardsave.save(Net(), tmp_path / str(number) / "ckpt", durable=False)
    damage(tmp_path / "0" / "ckpt", "down.weight", 600)
    error, message = same_everywhere(load_damaged_on_one_host, str(tmp_path))
    assert error == "CorruptCheckpointError" and re.match(
        r"corrupt shard model-0000.-of-00002\.safetensors: tensor 'down.w", message
    )
    assert re.search(r"; read by .*rank [01] \(machine0\)", message), message


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
            if case not in ("another shape", "summands", "no memory for all"):
                rows(net)
            if case == "summands":
                mesh = init_device_mesh("cpu", (RANKS,))
                net.down.bias = nn.Parameter(DTensor.from_local(torch.zeros(16), mesh, (Partial(),)))
            if rank == 1 and case == "another prefix":
                options["prefix"] = "up."
            if rank == 3 and case == "a wrong argument":
                options["strict"] = "yes"
            if rank == 3 and case == "a wrong path":
                path = 5
            if case == "no memory for all":
                net, free = Net(seed=1).to("meta"), SimpleNamespace(bytes=3 << 10, with_swap=3 << 10, of="the system")
                net.scratch = torch.zeros(3)
                rows(net)
                stack.enter_context(mock.patch("shardsave._common.memory_errors._SMALL", 1))
                stack.enter_context(mock.patch("shardsave._common.memory_errors.free_memory", return_value=free))
            if rank == 2 and case == "no memory":
                lack = shardsave.OutOfMemoryError("cannot load: no memory")
                stack.enter_context(mock.patch("shardsave._loading.module_filler.check_free_memory", side_effect=lack))
            if rank == 1 and case == "an error of the disk":
                fault = TransferFault(0, "pread", 5, 4096, 512)
                stack.enter_context(mock.patch("shardsave._engine.engine.read", side_effect=fault))
            before = [_local(parameter).clone() for parameter in net.parameters()]
            errors.append(raised(lambda: shardsave.load_model(net, path, **options)))
        now = map(_local, net.parameters())
        unchanged = all(was.is_meta == one.is_meta and (was.is_meta or torch.equal(one, was)) for one, was in zip(now, before))
        assert unchanged or case == "an error of the disk", case
    return errors


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


CASES = {
    "another shape": ("IncompatibleCheckpointError", "rank 2", "up.weight [13, 16] on disk, [12, 16] in the module"),
    "another prefix": ("ValueError", "the same prefix", "it is '' on rank 0, rank 2, rank 3, 'up.' on rank 1"),
    "a wrong argument": ("TypeError", "rank 3", "strict"),
    "a wrong path": ("ValueError", "rank 3", "5"),
    "no memory": ("OutOfMemoryError", "rank 2", "no memory"),
    "no memory for all": ("OutOfMemoryError", "of memory on the CPU were expected, the system has", "the module is unchanged"),
    "summands": ("UnsupportedTensorError", "cannot fill 'down.bias'", "the ranks have summands", "the module is unchanged"),
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


def end_in_load(rank: int, folder: str, who: int, when: str, number: signal.Signals) -> None:
    """Rank ``who`` is killed or stopped: before it reads, while it reads, or when it has read everything."""
    net = Net(seed=1)
    columns(net)
    places = {
        "before": "_ranks.load_job.LoadJob.reader",
        "within": "_engine.engine.read",
        "after": "_ranks.load_job.LoadJob.ended",
    }
    strike = mock.patch(f"shardsave.{places[when]}", side_effect=lambda *_, **__: os.kill(os.getpid(), number))
    with strike if rank == who else nullcontext():
        shardsave.load_model(net, folder, rank_timeout=3.0)


@pytest.mark.parametrize(
    ("when", "number"),
    [("before", signal.SIGSTOP), ("within", signal.SIGKILL), ("within", signal.SIGSTOP), ("after", signal.SIGKILL)],
)
def test_a_rank_that_is_lost(when: str, number: signal.Signals, tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one that was killed or stopped, or do not say which it is."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    began = time.monotonic()
    with Job(RANKS, end_in_load, str(tmp_path / "ckpt"), 2, when, number) as job:
        ends = job.ended(ranks=[0, 1, 3])
    assert time.monotonic() - began < 60
    assert all(end.error == "ShardSaveError" and "rank 2 was lost" in end.message for end in ends), ends


@pytest.mark.parametrize("store_in", ["agent", "rank 0"])
def test_rank_0_is_lost(store_in: str, tmp_path: Path) -> None:
    """Catches ranks that wait for the store, which dies with rank 0, or that raise an error of a class that nobody can import."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    with Job(RANKS, end_in_load, str(tmp_path / "ckpt"), 0, "within", signal.SIGKILL, store_in=store_in) as job:
        ends = job.ended(ranks=[1, 2, 3])
    assert all(end.error == "ShardSaveError" and "rank 0" in end.message for end in ends), ends


def load_replaced(rank: int, folder: str) -> int:
    """Rank 1 opens the checkpoint before a save has replaced it, the others afterwards."""
    opens = 0
    before = Checkpoint.identity

    def identity(self: Checkpoint) -> bytes:
        nonlocal opens
        opens += 1
        return b"an older one" if rank == 1 and opens == 1 else before(self)

    with mock.patch.object(Checkpoint, "identity", identity):
        net = Net(seed=1)
        rows(net)
        shardsave.load_model(net, folder)
    check_equal(net, Net())
    return opens


def test_a_checkpoint_that_is_replaced(tmp_path: Path) -> None:
    """Catches ranks that fill one model from two checkpoints."""
    shardsave.save(Net(), tmp_path / "ckpt", durable=False)
    assert run_ranks(RANKS, load_replaced, str(tmp_path / "ckpt")) == [2] * RANKS
