"""Shared by the tests of several wings: paths of the project, a small model, comparisons bit by bit, forked children."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests"

Compile = Callable[..., Path]


def let_everybody_in(folder: Path) -> None:
    """Lets every user enter ``folder`` and write to it: pytest creates directories only for the user who runs it."""
    folder.chmod(folder.stat().st_mode | 0o077)
    for above in folder.parents:
        if above.stat().st_mode & 0o005 != 0o005:
            above.chmod(above.stat().st_mode | 0o055)


class SmallModel(nn.Module):
    """Has a frozen part, tied weights, a persistent and a non-persistent buffer, and several dtypes."""

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


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (also NaN payloads and negative zeros)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_bytes = [t.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return torch.equal(*as_bytes)


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have state dicts with the same names and the same bits."""
    left_state, right_state = left.state_dict(), right.state_dict()
    if left_state.keys() != right_state.keys():
        return False
    return all(same_bits(left_state[name], right_state[name]) for name in left_state)


def is_locked(folder: Path) -> bool:
    """Whether a save holds the lock of ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def draw_trainable(model: nn.Module, seed: int) -> nn.Module:
    """``model``, with random values in the parameters that require grad."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def raised(call: Callable[[], object]) -> tuple[str, str]:
    """The class and the message of what ``call`` raises; empty if it raises nothing."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def forked(action: Callable[[], object]) -> int:
    """Forks a child that runs ``action`` and exits without cleaning up; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def holds_in_child(check: Callable[[], bool]) -> bool:
    """Whether ``check`` returns true in a forked child."""

    def exit_with_answer() -> None:
        os._exit(0 if check() else 1)

    return os.waitpid(forked(exit_with_answer), 0)[1] == 0


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Lets the address space of this process grow by 320 MiB, and by no more."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (320 << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
