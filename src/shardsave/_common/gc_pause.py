"""Pauses Python's garbage collector while tables of very many small objects are built."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection within the block, if it runs on the main thread.

    Nothing is garbage in a table of 100,000 names and offsets, yet each collection would walk over all objects of torch. Only for
    short code, never around a transfer of bytes. Only the block that disabled the collector enables it again, so blocks may be nested.
    The collector is one for all threads: on another thread, such as that of a save in the background, a block would undo a `gc.disable`
    that the training makes meanwhile.
    """
    was_on = gc.isenabled() and threading.get_ident() == threading.main_thread().ident
    block = (threading.get_ident(), object())
    try:
        if was_on:
            _paused.add(block)
            gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()
            _paused.discard(block)  # an interrupt may have come before it was added


#: The blocks in progress that will enable the collector again: the thread, and an object of the block's own.
_paused: set[tuple[int, object]] = set()


def end_pauses() -> None:
    """Ends those blocks of this thread that an interrupt did not let end: it came at the beginning of their exit."""
    if _paused:
        own = {block for block in tuple(_paused) if block[0] == threading.get_ident()}
        if own:
            gc.enable()
            _paused.difference_update(own)


def _enable_in_child() -> None:
    """Enables the collector in a forked child: the threads that would have done so do not exist there."""
    if _paused:
        gc.enable()


os.register_at_fork(after_in_child=_enable_in_child)
