"""Python's garbage collector, kept still while tables of a great many small objects are made."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_still() -> Iterator[None]:
    """No collection inside: of 100,000 tensors' names and places nothing is garbage, and each search walks over all of torch.

    For code that runs for a moment, never around the transfer. Whoever switched the collector off switches it on again, so
    calls may be nested and may run in several threads.
    """
    was_on = gc.isenabled()
    try:
        if was_on:
            _kept_still.append(None)
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()
            _kept_still.pop()


#: One entry for each thread inside that will switch the collector on again.
_kept_still: list[None] = []


def _enable_in_child() -> None:
    """The threads that would have done so do not exist in a forked child."""
    if _kept_still:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)
