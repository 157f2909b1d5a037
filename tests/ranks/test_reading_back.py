"""Ranks read the shards that a save takes over back from the disk together, each a part; what is damaged is written anew.

Method: each rank notes what it reads, cannot read something, or ends while it reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_reuse_on_ranks import LAYER, flip_last_byte, layers, save
from torch import nn

import shardsave
from jobs import Job, run_ranks
from shardsave._common.os_calls import CallFailed
from shardsave._engine.transfer import TransferFault
from shardsave._ranks import reading_back
from shardsave._ranks.reading_back import _share
from shardsave._saving import read_back, reuse
from shardsave._storage.earlier import EarlierFolder
from support import raised

RANKS = 4


def note_what_is_read(rank: int, folder: Path) -> list[list[tuple[str, ...]]]:
    model = layers()
    save(model, folder / "ckpt")
    found = []
    read: list[tuple[str, ...]] = []
    sums_on_disk = reading_back.sums_on_disk

    def note(file: int, layout: Any, *rest: Any) -> Any:
        read.append(tuple(tensor.name for tensor in layout.tensors))
        return sums_on_disk(file, layout, *rest)

    with mock.patch.object(reading_back, "sums_on_disk", note):
        for every in (10, 10, 1):
            report = save(model, folder / "ckpt", recheck_every=every)
            assert report.bytes_written == 0
            found.append([*read])
            read.clear()
            dist.barrier()
    return found


def test_each_rank_reads_a_part(tmp_path: Path) -> None:
    """Catches a tensor that no rank reads back, or two, one rank that reads for all, and what is read again too early or not at all."""
    per_rank = run_ranks(RANKS, note_what_is_read, tmp_path)
    names = [f"{layer}.{kind}" for layer in range(5) for kind in ("bias", "weight")]
    for read in ([per_rank[rank][turn] for rank in range(RANKS)] for turn in (0, 2)):
        assert sorted(name for of_rank in read for part in of_rank for name in part) == names
        assert all(1 <= sum(name.endswith("weight") for part in of_rank for name in part) <= 2 for of_rank in read), read
    assert [found[1] for found in per_rank] == [[]] * RANKS


@pytest.mark.parametrize("seed", range(20))
def test_shares(seed: int) -> None:
    """Catches tensors that are in no share or in two, shares out of order, and one that is too long by more than a tensor."""
    draw = np.random.default_rng(seed)
    nbytes = draw.choice([0, 1, 100, 5000], draw.integers(1, 30)).tolist() if seed else [0, 0]
    ranks = int(draw.integers(1, 9))
    shares = [_share(nbytes, rank, ranks) for rank in range(ranks)]
    assert [number for first, stop in shares for number in range(first, stop)] == [*range(len(nbytes))]
    assert all(sum(nbytes[first:stop]) <= sum(nbytes) / ranks + max(nbytes) for first, stop in shares)


def find_damage(rank: int, folder: Path) -> list[tuple[int, tuple[str, ...]]]:
    """One file is damaged, which rank 3 reads; then all, so that each rank finds something."""
    model, found = layers(), []
    for name in ("last", "all"):
        save(model, folder / name)
        if rank == 0:
            shards = sorted((folder / name).glob("*.safetensors"))
            for shard in shards if name == "all" else shards[-1:]:
                flip_last_byte(shard)
        dist.barrier()
        report = save(model, folder / f"{name}-next", reuse=folder / name)
        found.append((report.bytes_written // LAYER, report.notes))
    return found


def test_damage_that_any_rank_finds(tmp_path: Path) -> None:
    """Catches damage in the share of another rank than 0 that is taken over, or not named as in a save of one process."""
    ends = run_ranks(RANKS, find_damage, tmp_path)
    assert all(end == ends[0] for end in ends)
    (written, (last,)), (all_written, notes) = ends[0]
    assert (written, all_written) == (1, 5)
    for name, number, note in (("last", 4, last), *(("all", number, note) for number, note in enumerate(notes))):
        shard = f"model-{number + 1:05d}-of-00005.safetensors of {tmp_path / name}"
        assert note.startswith(f"{shard} is damaged, it was written anew: tensor '{number}.bias' has checksum "), note
    assert len(notes) == 5 and all(shardsave.verify(tmp_path / f"{name}-next").verified for name in ("last", "all"))


def cannot_read(rank: int, folder: Path, who: int, how: str) -> list[tuple[int, tuple[str, ...]]]:
    """Rank ``who`` does not see the directory, or not the files, or gets errors from the disk; one file is damaged, too."""
    model, found = layers(), []
    errors = {
        "__init__": CallFailed("open", "", errno.ENOENT, os.strerror(errno.ENOENT)),
        "open": CallFailed("open", "", errno.EIO, os.strerror(errno.EIO)),
    }

    def fail(*_: Any) -> Any:
        raise errors.get(how, TransferFault(0, "pread", errno.EIO, 0, 4096))

    def another_file(*_: Any) -> None:
        return None

    place: Any = mock.patch.object(EarlierFolder, "open", another_file)
    if how in errors:
        place = mock.patch.object(EarlierFolder, how, fail)
    elif how == "pread":
        place = mock.patch.object(reading_back, "sums_on_disk", fail)
    save(model, folder / "ckpt")
    for damaged in (False, True):
        if damaged and rank == 0:
            for shard in (folder / "ckpt").glob("*.safetensors"):
                flip_last_byte(shard)
        dist.barrier()
        reuse._taken.clear()
        with place if rank == who else contextlib.nullcontext():
            report = save(model, folder / f"next-{damaged}", reuse=folder / "ckpt")
        found.append((report.bytes_written // LAYER, report.notes))
    return found


@pytest.mark.parametrize("how", ["__init__", "open", "another file", "pread"])
@pytest.mark.parametrize("who", [0, 2])
def test_what_one_rank_cannot_read(tmp_path: Path, who: int, how: str) -> None:
    """Catches a save that fails, or writes anew, since one rank cannot read what rank 0 can; and damage that nobody finds then."""
    ends = run_ranks(RANKS, cannot_read, tmp_path, who, how)
    assert all(end == ends[0] for end in ends)
    assert ends[0][0] == (0, ())
    written, notes = ends[0][1]
    assert written == 5 and len(notes) == 5 and all("is damaged, it was written anew" in note for note in notes)
    assert shardsave.verify(tmp_path / "next-True").verified


def nobody_can_read(rank: int, folder: Path) -> tuple[int, tuple[str, ...]]:
    model = layers()
    save(model, folder / "ckpt")

    def fail(*_: Any) -> Any:
        raise TransferFault(0, "pread", errno.EIO, 0, 4096)

    with mock.patch.object(reading_back, "sums_on_disk", fail), mock.patch.object(read_back, "sums_on_disk", fail):
        report = save(model, folder / "ckpt")
    return report.bytes_written // LAYER, report.notes


def test_what_nobody_can_read(tmp_path: Path) -> None:
    """Catches a file that is taken over although no rank can read it, and a reason that is not named."""
    ends = run_ranks(RANKS, nobody_can_read, tmp_path)
    assert all(end == ends[0] for end in ends)
    written, notes = ends[0]
    assert written == 5 and len(notes) == 5 and shardsave.verify(tmp_path / "ckpt").verified
    assert all(f"of {tmp_path / 'ckpt'} cannot be read (" in note and note.endswith("it was written anew") for note in notes)


def die_while_reading(rank: int, folder: Path, who: int) -> tuple[str, str]:
    model = layers()
    save(model, folder / "ckpt")
    dist.barrier()

    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(reading_back, "sums_on_disk", die) if rank == who else contextlib.nullcontext():
        return raised(lambda: save(model, folder / "ckpt", rank_timeout=20))


@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_that_dies_while_it_reads_back(tmp_path: Path, who: int) -> None:
    """Catches ranks that wait for a dead one, or do not name it, a commit without it, and a next save that does not work."""
    alive = [rank for rank in range(RANKS) if rank != who]
    with Job(RANKS, die_while_reading, tmp_path, who) as job:
        ends = [end.value for end in job.ended(60, ranks=alive)]
    for error, message in ends:
        assert error == "SaveNotCommittedError" and f"rank {who}" in message and "was lost" in message, ends
    assert shardsave.verify(tmp_path / "ckpt").verified
    report = shardsave.save({"0.weight": torch.ones(40, 40)}, tmp_path / "ckpt")
    assert report.bytes_reused == 0 and not [*(tmp_path / "ckpt").glob(".shardsave*")]


def count_sums(rank: int, folder: Path) -> list[Any]:
    """Notes how many bytes are summed before anything is written, in saves of replicas."""
    from shardsave._ranks import box_sums, replicas

    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(5)))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    summed: list[int] = []
    found: list[Any] = []
    checksums = replicas.checksums

    def note(sources: Any, **options: Any) -> Any:
        summed.append(sum(source.nbytes for source in sources))
        return checksums(sources, **options)

    def again(**options: Any) -> None:
        summed.clear()
        report = save(model, folder / "ckpt", process_group=dist.group.WORLD, **options)
        found.append((sum(summed) / LAYER, report.bytes_written, report.bytes_reused))
        dist.barrier()

    with mock.patch.object(box_sums, "checksums", note), mock.patch.object(replicas, "checksums", note):
        again()
        again()
        with torch.no_grad():
            model[3].weight.add_(1)
        again()
        again(dtype=torch.bfloat16)
        again(dtype=torch.bfloat16)
        if rank == 2:
            with torch.no_grad():
                model[1].weight.add_(1)  # of rank 2 alone
        again(dtype=torch.bfloat16, on_divergence="lowest_rank")
        summed.clear()
        pending = shardsave.save_async(
            model, folder / "ckpt", process_group=dist.group.WORLD, max_shard_size=LAYER, on_divergence="lowest_rank"
        )
        report = pending.wait(60)
        found.append((sum(summed), report.bytes_written // LAYER, len(report.notes)))
    return found


def test_replicas_are_summed_once(tmp_path: Path) -> None:
    """Catches replicas that are compared among ranks and then summed again, copies that were summed when they were made, and a sum that is
    believed of what has changed, or of what is cast on its way to the file."""
    ends = run_ranks(RANKS, count_sums, tmp_path)
    for first, second, changed, cast, cast_again, diverged, beside in ends:
        assert first == (5, 5 * LAYER, 0) and second == (5, 0, 5 * LAYER) and changed == (5, LAYER, 4 * LAYER)
        assert cast[1:] == (5 * LAYER // 2, 0) and cast_again[1:] == (0, 5 * LAYER // 2) == diverged[1:]
        assert beside == (0, 5, 1)
    loaded = shardsave.load(tmp_path / "ckpt")
    assert [loaded[f"{layer}.weight"][0, 0].item() for layer in range(5)] == [1, 1, 1, 2, 1]
