"""Refuses calls while something replaces torch's operators: their tensors have no memory, or are not what they seem."""

from __future__ import annotations

import os

import torch

from shardsave._common.os_calls import absolute_path
from shardsave.errors import UnsupportedTensorError

_MODES = torch._C._TorchDispatchModeKey


def check_operators(purpose: str, path: str | os.PathLike[str], state: str) -> None:
    """Raises UnsupportedTensorError within FakeTensorMode, a transform of torch.func (vmap, grad, functionalize) or a trace.

    ``purpose`` and ``state`` are for the message: what cannot be done, and in which state that leaves things.
    """
    active = _active()
    if active is not None:
        where = absolute_path(os.fspath(path))
        raise UnsupportedTensorError(
            f"cannot {purpose} {where}: torch's own operators were expected, {active} is active and replaces them; "
            f"call it outside; {state}"
        )


def _active() -> str | None:
    """What replaces torch's operators now; None if nothing does. Modes that only watch them (profilers, counters) do not count."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None:
        return f"a transform of torch.func ({interpreter.key().name.lower()})"
    for key in (_MODES.PROXY, _MODES.FAKE, _MODES.FUNCTIONAL):
        mode = torch._C._get_dispatch_mode(key)
        if mode is not None:
            return type(mode).__name__
    return "a trace of torch.jit" if torch.jit.is_tracing() else None
