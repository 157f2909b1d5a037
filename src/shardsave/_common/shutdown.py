"""The end of the interpreter, with saves or loads still at work on daemon threads.

A thread that comes back from C++ to an interpreter that is gone takes the process with it ("FATAL: exception not rethrown").
So these are ended before the interpreter is, as if each had been interrupted; other threads are waited for by Python itself.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

#: How long the end of the interpreter waits for them, in seconds: a disk may hang for longer.
_PATIENCE = 10.0

_lock = threading.Lock()  # guards _at_work
_at_work = 0
_ending = False


@contextmanager
def verb() -> Iterator[None]:
    """Around all that a verb does."""
    global _at_work
    raise_if_ending()
    with _lock:
        _at_work += 1
    try:
        yield
    except SystemExit as error:
        traceback.clear_frames(error.__traceback__)  # the tensors in them go now: torch must not be at it later, either
        raise
    finally:
        with _lock:
            _at_work -= 1


def raise_if_ending() -> None:
    """Ends the calling thread, quietly, when the interpreter ends around it."""
    if _ending and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _end() -> None:
    global _ending
    _ending = True
    deadline = time.monotonic() + _PATIENCE
    while _at_work > 0 and time.monotonic() < deadline:
        time.sleep(0.001)


def _forget_in_child() -> None:
    """The threads that were at work do not exist in a forked child; one of them may have held the lock."""
    global _lock, _at_work
    _lock, _at_work = threading.Lock(), 0


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_end)
