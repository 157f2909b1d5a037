"""The fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"

Compile = Callable[..., Path]

# A shell that starts a command in the background has it ignore SIGINT, and children inherit that: no Ctrl-C would be heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled() -> Compile:
    """``compiled("name.so", [sources], *flags)`` builds a C or C++ helper once and gives its path."""

    def build(name: str, sources: list[Path], *flags: str) -> Path:
        target = BUILD / name
        if not target.exists() or any(source.stat().st_mtime > target.stat().st_mtime for source in sources):
            target.parent.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "g++") if any(s.suffix == ".cpp" for s in sources) else os.environ.get("CC", "gcc")
            scratch = target.with_name(f"{target.name}.{os.getpid()}")
            command = [compiler, "-O2", "-g", "-Wall", "-Wextra", "-Werror", *map(str, sources), "-o", str(scratch), *flags]
            subprocess.run(command, check=True)
            scratch.replace(target)
        return target

    return build


@pytest.fixture(scope="session")
def beneath(compiled: Compile) -> Path:
    """The library that stands between a process and libc."""
    return compiled("beneath.so", [ROOT / "tests" / "faults" / "beneath.c"], "-shared", "-fPIC", "-pthread", "-ldl")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where fsync takes no time; an ordinary one where there is no place for it."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def let_everybody_in(folder: Path) -> None:
    """Makes ``folder`` one that every user may enter and write to: pytest keeps its directories for the user that runs it."""
    folder.chmod(folder.stat().st_mode | 0o077)
    for above in folder.parents:
        if above.stat().st_mode & 0o005 != 0o005:
            above.chmod(above.stat().st_mode | 0o055)


class SmallModel(nn.Module):
    """A little of everything: a frozen part, tied weights, a persistent and a non-persistent buffer, several dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 16)
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
        self.narrow = nn.Linear(16, 16).to(torch.bfloat16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(seed, seed + 5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.encoder.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(tokens))
        return self.head(self.narrow(hidden.to(torch.bfloat16)).to(hidden.dtype))


@pytest.fixture
def small_model() -> nn.Module:
    return SmallModel()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (NaN payloads and negative zeros too)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have the same names, and under each the same bits."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
