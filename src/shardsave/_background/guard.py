"""The one hook before the steps of all optimizers. It is registered only while a save reads memory that a step could change.

torch iterates over its hooks while a step waits in this one, and an ordered dict must not change under an iteration. The iterator of
C Python is already at its end while it runs the last hook, so this hook may be removed from within itself, or by another thread, as
long as no other hook is registered. Where there is one, the entry stays and does nothing until the next save uses it again.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.optim import optimizer as torch_optimizer

from shardsave._common.uncompiled import uncompiled

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Guard(Protocol):
    """What is asked before each step, on the thread that steps. It raises nothing but KeyboardInterrupt and the like."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Returns when ``optimizer`` may change what it holds."""


_lock = threading.Lock()  # guards the two below
_armed: tuple[Guard, ...] = ()  # read without the lock
_handle: RemovableHandle | None = None


def arm(guard: Guard) -> None:
    """From now on, until `disarm`, every step asks ``guard``."""
    global _armed, _handle
    with _lock:
        _armed = (*(other for other in _armed if other is not guard), guard)
        if _handle is None or _handle.id not in _hooks():
            _handle = torch_optimizer.register_optimizer_step_pre_hook(_before_step)


def disarm(guard: Guard) -> None:
    """Steps no longer ask ``guard``. May be called on any thread, and twice."""
    global _armed, _handle
    with _lock:
        _armed = tuple(other for other in _armed if other is not guard)
        if not _armed and _handle is not None and len(_hooks()) <= 1:
            _handle.remove()
            _handle = None


def inside_step() -> bool:
    """Whether the calling thread is inside the step of an optimizer: in its closure, or in a hook."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == torch_optimizer.__file__:
            return True
    return False


def _hooks() -> dict[int, Any]:
    return torch_optimizer._global_optimizer_pre_hooks


@uncompiled
def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Waits until ``optimizer`` may step. torch runs this before a closure runs forward and backward, which need not wait."""
    if not _armed:
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure) or not _runs_closure_first(optimizer):
        _wait(optimizer)
        return None

    def closure_then_wait(*arguments: Any, **options: Any) -> Any:
        result = closure(*arguments, **options)
        _wait(optimizer)
        return result

    if len(args) > 1:
        return (args[0], closure_then_wait, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure_then_wait}


def _runs_closure_first(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step is known to change nothing before the closure returns: torch's own. Others may; SAM does."""
    return type(optimizer).step.__module__.startswith("torch.optim.")


def _wait(optimizer: torch.optim.Optimizer) -> None:
    for guard in _armed:
        guard.before_step(optimizer)


def _forget_in_child() -> None:
    """A forked child has no thread that reads, so its steps wait for nothing."""
    global _lock, _armed
    _lock, _armed = threading.Lock(), ()


os.register_at_fork(after_in_child=_forget_in_child)
