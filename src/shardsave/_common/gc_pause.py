"""Pauses Python's garbage collector while tables of very many small objects are built."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection within the block.

    Nothing is garbage in a table of 100,000 names and offsets, yet each collection would walk over all objects of torch. Only for
    short code, never around a transfer of bytes. Only the block that disabled the collector enables it again, so blocks may be
    nested and may run in several threads.
    """
    was_on = gc.isenabled()
    try:
        if was_on:
            _paused.append(None)
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()
            _paused.pop()


#: One entry for each block in progress that will enable the collector again.
_paused: list[None] = []


def _enable_in_child() -> None:
    """Enables the collector in a forked child: the threads that would have done so do not exist there."""
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)
