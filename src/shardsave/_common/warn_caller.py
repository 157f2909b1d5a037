"""Warnings that point at the user's line, however deep in this package they are raised."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

from shardsave._printable import printable

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_CONTEXTLIB = contextlib.__file__  # the public verbs run inside its decorators
_COMPILER = os.path.join("torch", "_dynamo", "eval_frame.py")  # and inside one of torch's, once its compiler is there


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issues a warning for the innermost frame outside this package, in one line that a terminal can show."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_inner(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    warnings.warn(printable(message), category, stacklevel=level)


def _is_inner(path: str) -> bool:
    return path.startswith(_PACKAGE) or path == _CONTEXTLIB or path.endswith(_COMPILER)
