"""Ends saves and loads on daemon threads before the interpreter exits.

A thread that returns from C++ after the interpreter is gone aborts the process ("FATAL: exception not rethrown"). So an exit handler
interrupts these threads first and waits for them. Python itself waits for threads that are not daemons.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from shardsave._common.causes import escape_causes
from shardsave._common.gc_pause import end_pauses
from shardsave.errors import ShardSaveError

#: How long the exit handler waits for running calls, in seconds. With a hanging disk they may take longer.
_PATIENCE = 10.0

#: One object for each running call. It is added and discarded by single operations, without a lock: an interrupt could leave one locked.
_running_calls: set[object] = set()
_exiting = False


@contextmanager
def verb() -> Iterator[None]:
    """Marks the calling thread as inside a public call, so that interpreter exit waits for it. Errors leave it with plain causes."""
    outer = sys.exc_info()[1]
    raise_if_ending()
    call = object()
    try:
        _running_calls.add(call)
        yield
    except SystemExit as error:
        traceback.clear_frames(error.__traceback__)  # frees the tensors in them now, while torch still works
        raise
    except ShardSaveError as error:
        escape_causes(error, outer)
        raise
    finally:
        _running_calls.discard(call)
        end_pauses()


def raise_if_ending() -> None:
    """Ends the calling thread silently, unless it is the main thread, once the interpreter is exiting."""
    if _exiting and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _end_running_calls() -> None:
    global _exiting
    _exiting = True
    deadline = time.monotonic() + _PATIENCE
    while _running_calls and time.monotonic() < deadline:
        time.sleep(0.001)


#: In a forked child, the threads of other calls do not exist.
os.register_at_fork(after_in_child=_running_calls.clear)
atexit.register(_end_running_calls)
