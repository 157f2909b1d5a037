"""What a directory without steps is, if it is no new run."""

from __future__ import annotations

import os

from shardsave._format.file_names import INDEX_NAME, LONE_NAME, step_number
from shardsave._runs.steps import Run
from shardsave.errors import CheckpointNotFoundError, IncompatibleCheckpointError


def refuse_checkpoint(run: Run, purpose: str, shown: str) -> None:
    """Raises IncompatibleCheckpointError if ``run`` is the directory of one checkpoint, and has no steps."""
    name = _checkpoint_in(run.path)
    if name and not run.numbers():
        raise IncompatibleCheckpointError(
            f"cannot {purpose} {shown}: a run was expected, a directory of steps, it is a checkpoint itself, with {name}; pass the "
            f"directory above its steps, or another one; nothing was read or written"
        )


def why_no_run(path: str) -> CheckpointNotFoundError:
    """The error that says what is at ``path``, where there is no step."""
    begin = f"no run at {path}: directories such as step-00001000 were expected"
    if not os.path.isdir(path):
        return CheckpointNotFoundError(f"{begin}, there is no such directory")
    is_step = step_number(os.path.basename(os.path.abspath(path))) is not None
    if is_step or _checkpoint_in(path):
        what = "a step" if is_step else "a checkpoint"
        return CheckpointNotFoundError(f"{begin}, it is {what} itself; `shardsave inspect` shows it, `shardsave list` a run")
    return CheckpointNotFoundError(f"{begin}, there is none in this directory")


def _checkpoint_in(path: str) -> str:
    return next((name for name in (INDEX_NAME, LONE_NAME) if os.path.lexists(os.path.join(path, name))), "")
