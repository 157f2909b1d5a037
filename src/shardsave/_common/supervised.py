"""Runs code of another library on a thread of its own, which can be stopped: if it takes too much, or if the caller is interrupted.

Ctrl-C arrives in the main thread, between any two instructions, and leaves what another library has changed and was about to put back.
Here it arrives in a thread that only waits. Two threads do the work: a *keeper* changes what the process shares, watches, and puts it
back, and nothing interrupts it; a *worker* runs the code. Modes of torch that the code enters belong to the worker and end with it.
"""

from __future__ import annotations

import contextvars
import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from shardsave._common import shutdown

#: How often the keeper looks, and how long a caller waits for a worker that does not stop, in seconds.
_PERIOD, _PATIENCE = 0.02, 10.0

#: One worker at a time: what a keeper changes is shared by all threads.
_turn = threading.Lock()


def _renew_lock() -> None:
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class TooMuchTaken(Exception):
    """The worker was stopped, because it took more time or memory than it was given."""


class _Stop(SystemExit):
    """Raised in a worker: no ``except Exception`` catches it, and a thread that ends with it says nothing."""


def supervised(
    action: Callable[[], Any], around: Callable[[], AbstractContextManager[None]], seconds: float, nbytes: int
) -> Any:
    """The result of ``action()``, which may take ``seconds`` of processor time, and let the process grow by ``nbytes`` meanwhile.

    ``around()`` is entered before, and left after the worker has ended; it gets an exception if the worker was stopped. An error of
    ``action`` is raised here. If the calling thread is interrupted, the worker is stopped first. A call of C cannot be stopped: after
    10 seconds the caller no longer waits for it, and the worker is stopped when it returns; until then, others wait for their turn.

    Raises TooMuchTaken.
    """
    keeper = _Keeper(partial(contextvars.copy_context().run, action), around, seconds, nbytes)
    thread = threading.Thread(target=keeper.keep, name="shardsave-keeper", daemon=True)
    try:
        thread.start()
        while not keeper.done.wait(1):
            shutdown.raise_if_ending()
    except BaseException:
        keeper.interrupted = True
        if keeper.begun.wait(1):  # the thread may not have been started
            keeper.done.wait()
        raise
    return keeper.take()


class _Keeper:
    """Runs ``action`` on a worker; its own method ``keep`` runs on a thread that no signal interrupts."""

    def __init__(
        self, action: Callable[[], Any], around: Callable[[], AbstractContextManager[None]], seconds: float, nbytes: int
    ) -> None:
        self.begun, self.done = threading.Event(), threading.Event()
        self.interrupted = False
        self._action, self._around = action, around
        self._seconds, self._nbytes = seconds, nbytes
        self._result: Any = None
        self._error: BaseException | None = None
        self._clock: Callable[[], float] | None = None

    def take(self) -> Any:
        """The result, or the error, which is raised; neither is kept."""
        result, error = self._result, self._error
        self._result = self._error = None
        try:
            if error is not None:
                raise error
            return result
        finally:
            del error, result  # the traceback of the error has this frame

    def keep(self) -> None:
        self.begun.set()
        try:
            with shutdown.verb():
                while not _turn.acquire(timeout=_PERIOD):
                    self._raise_if_interrupted()
                try:
                    with self._around():
                        self._supervise()
                finally:
                    _turn.release()
        except BaseException as error:
            self._result, self._error = None, error.with_traceback(None)
        finally:
            self.done.set()

    def _supervise(self) -> None:
        """Waits for the worker. Raises why it was stopped."""
        worker = threading.Thread(target=self._work, name="shardsave-worker", daemon=True)
        before = _private_memory()
        self._raise_if_interrupted()
        worker.start()
        while worker.is_alive():
            worker.join(_PERIOD)
            try:
                self._raise_if_interrupted()
                self._check(before)
            except BaseException as reason:
                self._stop(worker, reason)
                raise

    def _work(self) -> None:
        try:
            self._clock = _thread_clock()
            self._result = self._action()
        except BaseException as error:
            self._error = error

    def _raise_if_interrupted(self) -> None:
        shutdown.raise_if_ending()
        if self.interrupted:
            raise _Stop

    def _check(self, before: int) -> None:
        try:
            seconds = self._clock() if self._clock is not None else 0.0
        except OSError:  # the thread has ended
            return
        if seconds > self._seconds:
            raise TooMuchTaken(f"more than {self._seconds:.0f} seconds")
        if _private_memory() - before > self._nbytes:
            raise TooMuchTaken(f"more than {self._nbytes >> 20} MiB of memory")

    def _stop(self, worker: threading.Thread, reason: BaseException) -> None:
        """Ends ``worker``, which may catch what is raised in it. Lets the caller go on if that takes long."""
        deadline, pause = time.monotonic() + _PATIENCE, _PERIOD
        while worker.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(_Stop))
            worker.join(pause)
            pause = min(2 * pause, 1.0)
            if time.monotonic() > deadline and not self.done.is_set():
                self._error = reason
                self.done.set()


def _thread_clock() -> Callable[[], float]:
    """The processor time that the calling thread has taken; on systems without such clocks, the time since now."""
    if hasattr(time, "pthread_getcpuclockid"):
        number = time.pthread_getcpuclockid(threading.get_ident())
        return lambda: time.clock_gettime(number)
    begun = time.monotonic()
    return lambda: time.monotonic() - begun


def _private_memory() -> int:
    """The bytes in memory that belong to this process alone, no pages of files; 0 on systems that do not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            resident, shared = map(int, file.read().split()[1:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
