"""Reports the progress of a transfer, as a progress bar or through a callback."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Union

from shardsave._common.imports import import_at_use

if TYPE_CHECKING:
    from tqdm import tqdm

#: A bar that was not requested appears only after this many seconds.
LONG_SECONDS = 2.0

ProgressArgument = Union[None, bool, Callable[[int, int], object]]


def _is_terminal() -> bool:
    """Whether stderr is a terminal. A replacement of stderr may lack ``isatty`` or raise from it."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError, OSError):
        return False


class Progress:
    """Turns the engine's ticks into a progress bar, or into calls of the user's function with (bytes done, total bytes)."""

    def __init__(self, wanted: ProgressArgument, title: str, total: int) -> None:
        self._call = wanted if callable(wanted) else None
        self._title = title
        self._total = total
        self._base = 0  # bytes of the runs that have ended
        self._bar: tqdm[None] | None = None
        if wanted is True:
            self._appear_at = 0.0
        elif wanted is None and _is_terminal():
            self._appear_at = time.monotonic() + LONG_SECONDS
        else:
            self._appear_at = float("inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            with suppress(AttributeError, ValueError, OSError):
                self._bar.close()

    def expect(self, total: int) -> None:
        """There are ``total`` bytes to move; called before the first is."""
        self._total = total

    def tick(self, done: int) -> None:
        """Reports that the current run of the engine has moved ``done`` bytes."""
        done += self._base
        if self._call is not None:
            self._call(done, self._total)
        if self._bar is not None or time.monotonic() >= self._appear_at:
            try:
                self._show(done)
            except (AttributeError, ValueError, OSError):  # stderr is closed, missing or full: no reason to stop
                self._bar, self._appear_at = None, float("inf")

    def _show(self, done: int) -> None:
        if self._bar is None:
            tqdm = import_at_use("tqdm").tqdm
            self._bar = tqdm(total=self._total, desc=self._title, unit="B", unit_scale=True, file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def run_ended(self, done: int) -> None:
        """Reports that the current run has moved all its ``done`` bytes; another run may follow."""
        self.tick(done)
        self._base += done
