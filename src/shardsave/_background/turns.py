"""One save in the background at a time: who has the turn, and what becomes of that save when the process ends or forks.

Threads: any. The turn is one entry of a dict, since `dict.setdefault` is atomic: a lock could be held by the very thread that a signal
handler interrupts, and in which it saves.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Literal, Protocol

from shardsave._common.shutdown import raise_if_ending
from shardsave._printable import printable
from shardsave.errors import DirectoryBusyError

IfBusy = Literal["wait", "raise", "skip"]

#: How often a thread that waits for its turn looks whether the process ends, in seconds.
_POLL_SECONDS = 0.1

#: After how many seconds an exit that waits says why.
_SILENT_SECONDS = 3.0


class Turn(Protocol):
    """A save in the background, as far as others wait for it."""

    path: str
    staged: threading.Event

    def wait_ended(self, timeout: float | None = None) -> bool: ...

    def cancel(self) -> bool: ...

    def abandon(self) -> None: ...

    @property
    def is_lost(self) -> bool:
        """Whether nobody ends it any more, unless this thread calls `abandon`."""

    @property
    def is_of_this_thread(self) -> bool:
        """Whether this thread prepares it or runs it, so that it cannot go on while this thread waits."""


_turn: dict[None, Turn] = {}  # empty, or one entry
_alive: weakref.WeakSet[Turn] = weakref.WeakSet()  # for a fork
_exiting: list[None] = []  # one element once the process ends: no thread is started any more


def take_turn(flight: Turn, if_busy: IfBusy) -> float | None:
    """Makes ``flight`` the one save in the background. Returns how many seconds that took; None if it is to be skipped.

    Raises DirectoryBusyError if another one has the turn and ``if_busy="raise"``, or if that one is of this very thread.
    """
    started = time.perf_counter()
    _alive.add(flight)
    end_lost()
    while (other := _turn.setdefault(None, flight)) is not flight:
        if if_busy == "skip":
            return None
        if if_busy == "raise" or other.is_of_this_thread:
            why = "is still running" if not other.is_of_this_thread else "on this same thread is interrupted by this one"
            raise DirectoryBusyError(
                f"cannot save to {flight.path}: no other save in the background was expected, that of {other.path} {why}; nothing "
                f"was written, the previous checkpoint is intact"
            )
        raise_if_ending()
        other.wait_ended(_POLL_SECONDS)
    return time.perf_counter() - started


def leave_turn(flight: Turn) -> None:
    """Ends the turn of ``flight``, if it has it."""
    if _turn.get(None) is flight:
        del _turn[None]


def in_flight() -> Turn | None:
    """The save that has the turn."""
    return _turn.get(None)


def end_lost() -> None:
    """Ends the save that has the turn, if two interrupts in a row have left it behind."""
    flight = in_flight()
    if flight is not None and flight.is_lost:
        flight.abandon()


def process_ends() -> bool:
    """Whether the process is at its end: a thread that is started now would not be waited for, if it can be started at all."""
    return bool(_exiting)


def _wait_at_exit() -> None:
    """Lets the save in the background end before the interpreter does. A second Ctrl-C gives it up.

    Python calls this before it waits for its threads, also in children of multiprocessing, where no `atexit` function runs.
    """
    _exiting.append(None)
    silent, interrupts = True, 0
    while (flight := in_flight()) is not None:
        try:
            end_lost()
            if not flight.wait_ended(_SILENT_SECONDS) and silent:
                silent = False
                _say(f"the program ends as soon as {flight.path} is saved; Ctrl-C says how to give that up")
        except KeyboardInterrupt:
            silent, interrupts = False, interrupts + 1
            if interrupts == 1:
                _say(f"{flight.path} is still being saved; Ctrl-C again gives that up, the previous checkpoint stays as it is")
            elif flight.cancel():
                _say(f"the save of {flight.path} is given up")
            else:
                _say(f"the save of {flight.path} can no longer be given up: it is being committed")


def _say(sentence: str) -> None:
    with contextlib.suppress(AttributeError, ValueError, OSError):  # stderr is missing, closed or full
        sys.stderr.write(f"shardsave: {printable(sentence)}\n")
        sys.stderr.flush()


def _forget_in_child() -> None:
    """In a forked child no save of the parent is in flight; nobody there may wait for an event that nobody will set."""
    _turn.clear()
    _exiting.clear()
    for flight in list(_alive):
        flight.staged = threading.Event()
        flight.staged.set()


os.register_at_fork(after_in_child=_forget_in_child)

# Not `atexit`: it runs after Python has waited for its threads, and not at all in a child of multiprocessing. But it is no private
# function, so it is what is left if a later Python has no other one: then the end waits all the same, for the thread that saves.
_register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
try:
    _register(_wait_at_exit)
except RuntimeError:  # the process ends already
    _exiting.append(None)
