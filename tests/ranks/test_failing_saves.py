"""What is wrong with one rank before anything is written: all are told, nothing is left, and the next save works."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardsave
from jobs import run_ranks
from support import raised

RANKS = 4


def save_without_rank_0(rank: int, folder: Path) -> str:
    """The others come one after the other, so they also leave one after the other."""
    tensors, group = {"x": torch.ones(3)}, dist.group.WORLD
    if rank == 0:
        return ""
    time.sleep(0.2 * rank)
    try:
        shardsave.save(tensors, folder / "ckpt", process_group=group, rank_timeout=1.6)
    except shardsave.SaveNotCommittedError as error:
        return str(error)
    return "no error"


def test_who_came_at_different_times(tmp_path: Path) -> None:
    """Catches a rank that names others as missing which came before it, waited as long, and have left."""
    _, *messages = run_ranks(RANKS, save_without_rank_0, tmp_path)
    assert len({*messages}) == 1 and "within rank_timeout=1.6 s, rank 0 did not" in messages[0], messages


class Refusing:
    """An object of the user whose state cannot be had."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        if self.refuses:
            raise RuntimeError("a loader of the user")
        return {"position": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"position": 3}


def save_what_refuses(rank: int, folder: Path, who: int, asynchronous: bool) -> tuple[str, list[str], int]:
    model, group = torch.nn.Linear(2, 2), dist.group.WORLD
    torch.nn.init.ones_(model.weight)
    torch.nn.init.ones_(model.bias)
    words = ""
    try:
        training = {"loader": Refusing(rank == who)}
        if asynchronous:
            shardsave.save_async(model, folder / "ckpt", training=training, rng=True, process_group=group).wait(60)
        else:
            shardsave.save(model, folder / "ckpt", training=training, rng=True, process_group=group)
    except Exception as error:
        words = str(error)
    dist.barrier()
    left = os.listdir(folder / "ckpt") if (folder / "ckpt").exists() else []
    dist.barrier()
    report = shardsave.save(model, folder / "ckpt", training={"loader": Refusing(False)}, rng=True, process_group=group)
    return words, left, report.tensors


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("who", [0, 2])
def test_a_training_state_that_cannot_be_described(tmp_path: Path, who: int, asynchronous: bool) -> None:
    """Catches an exception of the user's code on one rank for which the others wait, and a model that is saved without its training."""
    for words, left, tensors in run_ranks(RANKS, save_what_refuses, tmp_path, who, asynchronous):
        assert "a loader of the user" in words and left == [] and tensors == 2, words
    assert "training state" in shardsave.inspect(tmp_path / "ckpt").parts


def save_from_elsewhere(rank: int, folder: Path, who: int) -> tuple[str, str, float]:
    """Rank ``who`` is in another directory, in which another one has the same path."""
    tensors, group = {name: torch.ones(64) for name in "abcd"}, dist.group.WORLD
    os.chdir(folder / ("elsewhere" if rank == who else "here"))
    found = raised(lambda: shardsave.save(tensors, "ckpt", process_group=group, max_shard_size="256B"))
    dist.barrier()
    os.chdir(folder / "here")
    value = shardsave.load("ckpt")["a"][0].item()
    dist.barrier()
    shardsave.save(tensors, "ckpt", process_group=group, max_shard_size="256B", durable=False)
    return *found, value


@pytest.mark.parametrize("who", [0, 2])
def test_a_directory_that_is_not_shared(tmp_path: Path, who: int) -> None:
    """Catches ranks that write into two directories of the same path, or that lose a checkpoint in one of them."""
    for name in ("here", "elsewhere"):
        shardsave.save({"a": torch.zeros(3)}, tmp_path / name / "ckpt", durable=False)
    ends = run_ranks(RANKS, save_from_elsewhere, tmp_path, who)
    assert all(end == ends[0] for end in ends), ends
    error, message, value = ends[0]
    assert error == "SaveNotCommittedError" and "it is not a shared directory" in message and "rank" in message, message
    assert value == 0 and shardsave.load(tmp_path / "elsewhere" / "ckpt")["a"][0] == 0
    assert shardsave.load(tmp_path / "here" / "ckpt")["a"][0] == 1
    for name in ("here", "elsewhere"):
        assert not [path for path in (tmp_path / name / "ckpt").iterdir() if path.name.startswith(".shardsave")]
