"""One save in the background: its thread, what has become of it, and how it is cancelled and waited for.

Threads: a *caller* makes a flight and launches it, a *saving thread* runs it, anybody may wait for it or cancel it. What they share is
changed by single operations of dict and list, which are atomic, and no lock is shared: a signal handler may wait for the flight that
its own thread was just asking about. In a forked child, a flight of the parent is over.
"""

from __future__ import annotations

import _thread
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Generic, Literal, Protocol, TypeVar

from shardsave._background.failures import note_failure
from shardsave._background.turns import leave_turn, process_ends
from shardsave._common.job_errors import is_marked, shorten, without_own_frames
from shardsave._common.log_records import log_event
from shardsave._common.shutdown import raise_if_ending, verb
from shardsave._printable import printable
from shardsave.errors import SaveCancelledError, ShardSaveError

Result = TypeVar("Result")

#: What a flight comes to: whoever decides first. "over": it ended without an attempt to commit.
_Decision = Literal["commit", "cancel", "over"]

#: How long a caller that was interrupted waits for a thread that it may have started, in seconds.
_PATIENCE = 1.0


class Finished(Protocol):
    """What a flight ends when it ends."""

    def finish(self) -> None: ...


class Flight(Generic[Result]):
    """A save into ``path`` that ends with a ``Result`` or an error.

    ``staged``: set once all bytes are of the moment of the call, and at the end. ``staging``: what is finished at the end.
    ``stall_seconds``: how long the call has stopped its caller. ``committed``: whether there is a new checkpoint. ``told``: whether
    somebody has learnt of the error.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.staged = threading.Event()
        self.staging: Finished | None = None
        self.stall_seconds = 0.0
        self.committed = False
        self.told = False
        self.skipped = False
        self.error: BaseException | None = None
        self.ended = False
        self.pid = os.getpid()
        self._result: Result | None = None
        self._decision: dict[None, _Decision] = {}
        self._runner: dict[None, int] = {}  # the thread that runs it
        self._ender: dict[None, int] = {}  # the thread that ends it
        self._bells: list[_thread.LockType] = []  # each of somebody who waits
        self._job: Callable[[], Result] | None = None
        self._caller = threading.get_ident()
        self._call: FrameType | None = sys._getframe(1)  # that of the caller, until the flight needs it no more
        self._launched = False
        self._is_open = False
        # Locks and no events: an interrupt in `Event.set` can leave the event's own lock locked.
        self._begun, self._gate = _thread.allocate_lock(), _thread.allocate_lock()
        self._begun.acquire()
        self._gate.acquire()

    @property
    def is_foreign(self) -> bool:
        """Whether it is a flight of the parent, in a forked child."""
        return os.getpid() != self.pid

    @property
    def is_of_this_thread(self) -> bool:
        here = threading.get_ident()
        return here == self._runner.get(None) or (here == self._caller and self._call is not None)

    def launch(self, job: Callable[[], Result], started: float) -> None:
        """Starts a thread that calls ``job`` once this method is over, also if it is cancelled until then. If there can be no thread, calls
        it now.

        ``started``: when the call of the caller began, as `time.perf_counter` counts.
        """
        self._job = job
        thread = threading.Thread(target=self._run, name="shardsave", daemon=False)
        try:
            if process_ends():
                raise RuntimeError("nobody would wait for a thread")
            self._launched = True
            # An interrupt in `Thread.start` can upset a lock for which the new thread then waits, and the exit for that thread.
            _thread.start_new_thread(self._start, (thread,))
        except (RuntimeError, MemoryError):  # there are too many threads, or the process ends
            return self.run_here(job)
        self.stall_seconds = time.perf_counter() - started
        self._open_gate()
        self._call = None

    def _start(self, thread: threading.Thread) -> None:
        """Starts ``thread``, or does its work, on a thread that no interrupt reaches."""
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # there is one too many now, or the process ends
            self._run()

    def run_here(self, job: Callable[[], Result]) -> None:
        """Calls ``job`` on this thread. Its error is that of the flight, and raised only if it is an interrupt."""
        self._job = job
        self._open_gate()
        interrupt = self._run()
        if interrupt is not None:
            raise interrupt

    def skip(self, result: Result) -> None:
        """Ends a flight that did not get its turn."""
        self.skipped = True
        self._end(result, None)

    def abandon(self) -> None:
        """Ends the flight after an error or an interrupt in the call: cancels it, waits for its thread, and leaves nothing behind.

        Another interrupt, as of a launcher that passes Ctrl-C on, ends only the waiting for a thread that ends the flight by itself.
        """
        while not self.ended:
            try:
                self._abandon()
            except BaseException:  # the caller raises the first one
                if self._is_run_elsewhere:
                    break

    def _abandon(self) -> None:
        self.cancel()
        self._open_gate()
        if self._launched and (self._is_run_elsewhere or self._begun.acquire(timeout=_PATIENCE)):
            self.wait_ended()
        self._end(None, self._cancelled(), silent=True)

    @property
    def is_lost(self) -> bool:
        """Whether nobody will end it unless this thread calls `abandon`: its call was interrupted, and so was the end of that call."""
        if self._call is None or not self.is_of_this_thread:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._call:
            frame = frame.f_back
        return frame is None

    @property
    def _is_run_elsewhere(self) -> bool:
        """Whether another thread than this one runs the flight, and waits for nothing any more."""
        return self._is_open and self._runner.get(None, threading.get_ident()) != threading.get_ident()

    def _open_gate(self) -> None:
        with suppress(RuntimeError):  # it is open
            self._gate.release()
        self._is_open = True

    def _run(self) -> BaseException | None:
        """Calls the job and ends the flight. Returns what must be raised if this is the caller's thread."""
        if self._runner.setdefault(None, threading.get_ident()) != threading.get_ident():
            return None
        self._begun.release()
        self._gate.acquire()
        result, error, interrupt = None, None, None
        try:
            with verb():
                job, self._job = self._job, None
                assert job is not None
                result = job()
        except BaseException as caught:
            error = self._own_error(caught)
            interrupt = None if isinstance(caught, Exception) else caught
        job = None  # holds what is saved
        self._end(result, error)
        return interrupt

    def check(self) -> None:
        """Raises SaveCancelledError if the flight was cancelled, or ends with the process."""
        raise_if_ending()
        if self._decision.get(None) == "cancel":
            raise self._cancelled()

    def attempt_commit(self) -> None:
        """From now on, `cancel` returns False. Raises SaveCancelledError if it was cancelled before."""
        if self._decision.setdefault(None, "commit") == "cancel":
            raise self._cancelled()

    def cancel(self) -> bool:
        """Ends the save before its commit. Returns False if the commit has been attempted, or if the flight is over."""
        return not self.is_foreign and self._decision.setdefault(None, "cancel") == "cancel"

    def _cancelled(self) -> SaveCancelledError:
        return SaveCancelledError(
            f"cannot save to {self.path}: the save was cancelled; nothing was committed, the previous checkpoint is intact"
        )

    def _own_error(self, caught: BaseException) -> BaseException:
        """The error of a flight in which ``caught`` was raised."""
        error, decision = caught, self._decision.setdefault(None, "over")
        if decision == "commit" and not isinstance(caught, Exception):
            error = ShardSaveError(
                f"cannot tell whether {self.path} was saved: the save was interrupted at its commit; the previous checkpoint is there, or "
                f"the new one, whole"
            )
        elif (decision == "cancel" or not isinstance(caught, Exception)) and not isinstance(caught, SaveCancelledError):
            error = self._cancelled()
        elif isinstance(caught, Exception) and is_marked(caught):
            shorten(caught, None)
            cause = caught.__cause__
            if cause is not None and cause.__traceback__ is not None:
                caught.__cause__ = _TracebackText(cause)
        elif not isinstance(caught, ShardSaveError):
            error.__cause__ = _TracebackText(without_own_frames(caught))
        _drop_tracebacks(error)
        return error

    def _end(self, result: Result | None, error: BaseException | None, *, silent: bool = False) -> None:
        """Ends the flight, once. Whoever has seen the error sees a flight that is over soon after."""
        if self._ender.setdefault(None, threading.get_ident()) != threading.get_ident() or self.ended:
            return
        self._decision.setdefault(None, "over")
        try:
            self._result, self.error = result, error
            staging, self.staging = self.staging, None
            if staging is not None:
                staging.finish()
            if error is not None and not silent:
                self._tell(error)
        finally:
            self._job = self._call = None
            leave_turn(self)
            self.ended = True
            self.staged.set()
            while self._bells:
                self._bells.pop().release()

    def _tell(self, error: BaseException) -> None:
        """Logs the error, and leaves it for the notes of the next save."""
        if isinstance(error, SaveCancelledError):
            return log_event(logging.INFO, "save cancelled", str(error), path=self.path)
        problem = str(error) if isinstance(error, ShardSaveError) else f"{type(error).__name__}: {error}"
        failed = "was committed, but what followed failed" if self.committed else "failed"
        sentence = f"the background save of {self.path} {failed}: {problem}"
        note_failure(sentence)
        log_event(logging.ERROR, "background save failed", sentence, path=self.path, problem=problem)

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Waits until the flight is over. Returns False if that takes longer than ``timeout`` seconds."""
        if self.ended or self.is_foreign:
            return True
        bell = _thread.allocate_lock()
        bell.acquire()
        self._bells.append(bell)
        try:
            if not self.ended:  # it is set before the bells are rung
                bell.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        finally:
            with suppress(ValueError):
                self._bells.remove(bell)
        return self.ended

    def result(self) -> Result:
        """The result of a flight that is over without an error."""
        assert self._result is not None
        return self._result

    def tell_error(self) -> BaseException | None:
        """The error of the flight, for somebody who learns of it now."""
        if self.error is not None:
            self.told = True
        return self.error


class _TracebackText(Exception):
    """The cause of an error: an error that is none of this package, with its traceback, as text."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def __str__(self) -> str:
        return "\n" + "\n".join(map(printable, str(self.args[0]).splitlines()))


# what a traceback calls it
_TracebackText.__module__, _TracebackText.__qualname__ = "builtins", "On the thread that saves"


def _drop_tracebacks(error: BaseException) -> None:
    """Drops the tracebacks of ``error`` and its causes: they would keep the model alive as long as somebody keeps the error."""
    seen: set[int] = set()
    above: BaseException | None = error
    while above is not None and id(above) not in seen:
        seen.add(id(above))
        above.__traceback__ = None
        above = above.__cause__ or above.__context__
