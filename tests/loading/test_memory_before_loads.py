"""Loads that need more memory than is free: refused if they surely cannot fit, noted if they may have to swap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from shardsave._common import memory_errors
from shardsave._common.free_memory import FreeMemory

#: More than the size from which memory is asked for: 80 MB.
ELEMENTS = 20_000_000

Set = Callable[[int, int], None]


class Model(nn.Module):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(ELEMENTS, device=device))
        self.tied = self.x


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "ckpt"
    shardsave.save(Model(), folder, architecture=True, durable=False)
    return folder


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets how much memory is free, without and with swap space."""

    def set_free(nbytes: int, with_swap: int) -> None:
        monkeypatch.setattr(memory_errors, "free_memory", lambda: FreeMemory(nbytes, with_swap, "control group /jobs"))

    return set_free


VERBS: dict[str, tuple[Callable[[Path], object], str]] = {
    "load": (shardsave.load, "nothing was loaded"),
    "load_model": (lambda path: shardsave.load_model(Model("meta"), path), "the module is unchanged"),
    "build_model": (lambda path: shardsave.build_model(path, trust=[__name__, f"{__name__}.Model"]), "nothing was built"),
}


@pytest.mark.parametrize(("verb", "state"), VERBS.values(), ids=VERBS)
def test_a_load_that_cannot_fit(ckpt: Path, free: Set, verb: Callable[[Path], object], state: str) -> None:
    """Catches a load that begins although the kernel will end it, an error without the numbers, and a tied tensor that counts twice."""
    free(70_000_000, 79_000_000)
    with pytest.raises(shardsave.OutOfMemoryError) as refusal:
        verb(ckpt)
    assert isinstance(refusal.value, MemoryError)
    assert str(refusal.value) == (
        f"cannot load {ckpt}: 80.0 MB of memory on the CPU were expected, control group /jobs has 70.0 MB free (with swap, 79.0 MB); "
        f"load less at a time, map the files (mmap=True, or open), or load to a device; {state}"
    )
    free(70_000_000, 81_000_000)
    verb(ckpt)


def test_a_load_that_may_swap(ckpt: Path, free: Set) -> None:
    """Catches a refusal that rests on an estimate, and a load that says nothing of it."""
    free(70_000_000, 81_000_000)
    report = shardsave.load_model(Model("meta"), ckpt)
    assert report.notes == ("80.0 MB of memory were needed, control group /jobs had 70.0 MB free: a part may be swapped",)


class LoadsItself(Model):
    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


def test_a_copy_for_a_module_that_loads_itself(ckpt: Path, free: Set) -> None:
    """Catches a copy of a whole model, which its own code asks for, that nobody counted."""
    free(70_000_000, 79_000_000)
    model = LoadsItself()
    with pytest.raises(shardsave.OutOfMemoryError, match="80.0 MB of memory on the CPU were expected"):
        shardsave.load_model(model, ckpt)
    free(70_000_000, 90_000_000)
    shardsave.load_model(model, ckpt)


def test_loads_that_need_no_memory(ckpt: Path, free: Set) -> None:
    """Catches a refusal of what is filled in place, mapped, or not chosen."""
    free(0, 0)
    assert not shardsave.load_model(Model(), ckpt).notes
    assert shardsave.load(ckpt, mmap=True)["x"].numel() == ELEMENTS
    assert shardsave.load(ckpt, prefix="x", mmap=True) and shardsave.open(ckpt)["x"].numel() == ELEMENTS


def test_freed_memory_counts(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a refusal because of memory that this process has freed, and that the allocator still holds."""
    answers = [FreeMemory(1, 1, "this machine"), FreeMemory(10**9, 10**9, "this machine")]
    returned: list[int] = []
    monkeypatch.setattr(memory_errors, "free_memory", lambda: answers.pop(0))
    monkeypatch.setattr(memory_errors, "return_freed_memory", lambda: returned.append(len(answers)))
    assert shardsave.load(ckpt)["x"].numel() == ELEMENTS and returned == [1] and not answers


def test_a_system_that_does_not_say(ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a load that fails because nobody knows what is free."""
    monkeypatch.setattr(memory_errors, "free_memory", lambda: None)
    assert shardsave.load(ckpt)["x"].numel() == ELEMENTS


def test_small_loads_ask_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a small load that takes the time to import psutil."""
    shardsave.save({"x": torch.ones(10)}, tmp_path)
    monkeypatch.setattr(memory_errors, "free_memory", lambda: pytest.fail("asked"))
    assert shardsave.load(tmp_path)["x"].numel() == 10
