"""Keeps ``torch.compile`` out of this package; errors of a job leave a public call without the frames that they have passed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from shardsave._common.job_errors import shorten

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes ``function`` run as Python runs it, also where a function calls it that ``torch.compile`` compiles.

    torch would trace it, with its own numpy in the place of numpy, and raise errors of its compiler.
    """

    @functools.wraps(function)
    def run(*arguments: _P.args, **options: _P.kwargs) -> _T:
        outer = sys.exc_info()[1]
        try:
            # Importing the compiler takes a second. Without it, nothing is being compiled.
            if "torch._dynamo.eval_frame" not in sys.modules:
                return function(*arguments, **options)
            import torch

            apart: Callable[_P, _T] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return apart(*arguments, **options)
        except Exception as error:
            if not shorten(error, outer):
                raise
            raise error

    marked: Any = run
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = "it reads or writes files"
    return run
