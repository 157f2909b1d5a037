"""Paths: where they lead is decided when a verb is called, whatever other code does to the current directory meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave

ZEROS, ONES = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}

Verb = Callable[[Callable[[int, int], object]], Any]


def loaded_model(progress: Callable[[int, int], object]) -> float:
    model = nn.Linear(2, 2)
    shardsave.load_model(model, "ckpt", progress=progress)
    return float(model.weight.detach().sum())


def opened(progress: Callable[[int, int], object]) -> float:
    """Opens with room for one file, so that shards have to be opened again by their path."""
    with shardsave.open("sharded") as checkpoint:
        checkpoint._checkpoint.allowance = 1
        progress(0, 0)
        return float(checkpoint["weight"].sum() + checkpoint["bias"].sum()) - 2


READING: dict[str, Verb] = {
    "load": lambda progress: shardsave.load("ckpt", progress=progress)["weight"].sum(),
    "load_model": loaded_model,
    "open": opened,
    "verify": lambda progress: shardsave.verify("ckpt", progress=progress).intact and 4,
    "diff": lambda progress: 4 - len(shardsave.diff("ckpt", "sharded", progress=progress).changed),
}

WRITING: dict[str, Verb] = {
    "save": lambda progress: shardsave.save(ONES, "new", progress=progress, durable=False),
    "save of a program": lambda progress: shardsave.save(
        Moving(progress), "new", program=((torch.ones(2),), {}), durable=False
    ),
    "convert": lambda progress: shardsave.convert("ckpt", "new", progress=progress, durable=False),
    "convert to safetensors": lambda progress: shardsave.convert(
        "ckpt", "new", to="safetensors", progress=progress, durable=False
    ),
    "convert to torch": lambda progress: shardsave.convert("ckpt", "new", to="torch", progress=progress, durable=False),
}


class Moving(nn.Module):
    """Changes the current directory while it is traced."""

    def __init__(self, move: Callable[[int, int], object]) -> None:
        super().__init__()
        self._move = (move,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._move[0](0, 0)
        return x + 1


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with other checkpoints of the same names; the current directory has the right ones."""
    for folder, state in (("here", ONES), ("elsewhere", ZEROS)):
        (tmp_path / folder).mkdir()
        shardsave.save(state, tmp_path / folder / "ckpt", durable=False)
        shardsave.save(state, tmp_path / folder / "sharded", max_shard_size=16, durable=False)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("verb", READING.values(), ids=READING)
def test_reading_while_the_current_directory_changes(verb: Verb, elsewhere: Path) -> None:
    """Catches a file that is opened relative to a later current directory."""
    assert verb(lambda *_: os.chdir(elsewhere)) == 4


@pytest.mark.parametrize("verb", WRITING.values(), ids=WRITING)
def test_writing_while_the_current_directory_changes(verb: Verb, elsewhere: Path) -> None:
    """Catches a checkpoint or a file that is written relative to a later current directory; a report has the path as it was given."""
    before = sorted(os.listdir(elsewhere))
    report = verb(lambda *_: os.chdir(elsewhere))
    assert report.path == "new" and (elsewhere.parent / "here" / "new").exists()
    assert sorted(os.listdir(elsewhere)) == before


def test_messages_have_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message with a relative path, which says nothing in the log of a job; reports have paths as they were given."""
    monkeypatch.chdir(tmp_path)
    calls: dict[str, Callable[[], Any]] = {
        "no": lambda: shardsave.load("no"),
        "deep/no": lambda: shardsave.inspect("./deep/no"),
        "dir": lambda: shardsave.verify("dir"),
        "other": lambda: shardsave.convert("other", "new"),
        "../no": lambda: shardsave.open("../no"),
        "gone": lambda: shardsave.clean("gone"),
    }
    (tmp_path / "dir").mkdir()
    for path, call in calls.items():
        with pytest.raises(shardsave.CheckpointNotFoundError) as caught:
            call()
        assert f"{tmp_path}/{path}: " in str(caught.value)
    monkeypatch.chdir(tmp_path / "dir")
    with pytest.raises(shardsave.CheckpointNotFoundError, match=f"no checkpoint at {tmp_path}/dir: neither"):
        shardsave.load(".")
    assert shardsave.save(ONES, "new", durable=False).path == "new"


def test_a_directory_without_a_way_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a relative path that is not usable because the current directory's own path leads elsewhere, or nowhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "moved")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path / "here"))
    assert shardsave.inspect(shardsave.save(ONES, tmp_path / "moved" / "ckpt", durable=False).path).names
    assert shardsave.inspect("ckpt").names == ("weight", "bias")


def test_a_single_file_without_a_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare error of Python, or a hang, for a relative path of a file in a directory that no longer exists."""
    shardsave.save(ONES, tmp_path / "ckpt", durable=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for to in ("safetensors", "torch"):
        with pytest.raises(
            shardsave.SaveNotCommittedError, match="cannot save to new: the path is relative to the current dir"
        ):
            shardsave.convert(tmp_path / "ckpt", "new", to=to)
