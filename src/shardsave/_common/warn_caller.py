"""Warnings and log records that point at the user's line, however deep in this package they are raised."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator

from shardsave._printable import printable

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_CONTEXTLIB = contextlib.__file__  # the public verbs run inside its decorators
_COMPILER = os.path.join("torch", "_dynamo", "eval_frame.py")  # and inside one of torch's, once its compiler is there


_collecting = threading.local()


@contextlib.contextmanager
def warnings_collected() -> Iterator[list[str]]:
    """Collects the messages of `warn_caller` on this thread, instead of issuing warnings. For a thread on which nobody could hear them,
    and on which ``python -W error`` would turn them into failures.
    """
    messages: list[str] = []
    _collecting.messages = messages
    try:
        yield messages
    finally:
        del _collecting.messages


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issues a warning for the innermost frame outside this package, in one line that a terminal can show."""
    messages: list[str] | None = getattr(_collecting, "messages", None)
    if messages is not None:
        messages.append(message)
        return
    warnings.warn(printable(message), category, stacklevel=caller_level())


def caller_level() -> int:
    """The ``stacklevel`` with which the function that calls this one points at the innermost frame outside this package."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and is_inner(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    return level


def is_inner(path: str) -> bool:
    """Whether the file ``path`` has code of this package, or code that only runs between frames of it."""
    return path.startswith(_PACKAGE) or path == _CONTEXTLIB or path.endswith(_COMPILER)
