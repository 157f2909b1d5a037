"""Errors of a job of several ranks, as their caller sees them: the call, the message, and a cause that says more.

All ranks raise such an error, wherever it began. Where this package was when it learnt of it is of no use to anybody.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from shardsave._common.warn_caller import is_inner
from shardsave.errors import ShardSaveError

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: The attribute of an error of a job, and of one of the user's code that ended a job.
_OF_JOB, _OF_USER = "_shardsave_of_job", "_shardsave_of_user"
#: That of an error that one rank raises of what all have found.
_OF_ALL = "_shardsave_of_all"


def mark(error: Exception) -> None:
    """Makes ``error`` that of a job: of its causes only the first one stays that is none of this package."""
    error.__cause__ = _first_foreign(error.__cause__)
    setattr(error, _OF_JOB, True)


def mark_own(error: Exception) -> None:
    """Marks an error that code of the user or a library has raised in a job: it stays what it is on this rank."""
    setattr(error, _OF_USER, True)


def mark_common(error: Exception) -> Exception:
    """Marks an error that this rank raises for all of them: what it says is not about this rank."""
    setattr(error, _OF_ALL, True)
    return error


def is_common(error: BaseException | None) -> bool:
    """Whether `mark_common` was called with ``error``, or with one of its causes."""
    while error is not None and not getattr(error, _OF_ALL, False):
        error = error.__cause__
    return error is not None


def is_marked(error: BaseException) -> bool:
    """Whether `mark` was called with ``error``."""
    return getattr(error, _OF_JOB, False)


def retold(error: Exception, told: Exception) -> Exception:
    """``told``, which says more than ``error``, as an error of a job if ``error`` is one."""
    told.__cause__ = error
    if is_marked(error):
        mark(told)
    return told


def shorten(error: Exception, outer: BaseException | None) -> bool:
    """Takes from ``error``, if it is marked, the frames of this package that it has passed. Returns whether it is.

    ``outer``: what its caller was handling.
    """
    if is_marked(error):
        error.__traceback__ = None
        error.__context__, error.__suppress_context__ = outer, error.__cause__ is not None
        return True
    if getattr(error, _OF_USER, False) and _outside(error.__traceback__) is not None:
        without_own_frames(error)
        return True
    return False


def without_own_frames(error: BaseException) -> BaseException:
    """``error`` as it was raised in code of the user or a library, without the frames of this package that led there."""
    return error.with_traceback(_outside(error.__traceback__) or error.__traceback__)


def short_traceback(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets errors of a job leave ``function`` without the frames that they have passed."""

    @functools.wraps(function)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _T:
        outer = sys.exc_info()[1]
        try:
            return function(*arguments, **options)
        except Exception as error:
            if not shorten(error, outer):
                raise
            raise error

    return run


def _first_foreign(cause: BaseException | None) -> BaseException | None:
    """The first of ``cause`` and its causes that is of the operating system, or that code of the user or a library has raised."""
    seen = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        inner = cause.__cause__
        if isinstance(cause, OSError) and not _is_of_package(cause) and not isinstance(inner, OSError):
            return cause.with_traceback(_outside(cause.__traceback__))
        if not isinstance(cause, (OSError, ShardSaveError)) and not _is_raised_here(cause):
            return cause.with_traceback(_outside(cause.__traceback__))
        cause = inner
    return None


def _is_of_package(error: BaseException) -> bool:
    """Whether its class is of this package: the message of what it became says the same."""
    return type(error).__module__.startswith("shardsave.")


def _is_raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or _is_inner(trace)


def _outside(trace: TracebackType | None) -> TracebackType | None:
    """``trace`` from the first frame on that is none of this package."""
    while trace is not None and _is_inner(trace):
        trace = trace.tb_next
    return trace


def _is_inner(trace: TracebackType) -> bool:
    return is_inner(trace.tb_frame.f_code.co_filename)
