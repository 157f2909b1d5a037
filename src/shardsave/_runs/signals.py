"""Signals that ask for a last save. A handler only notes the signal: the save comes at the next step, when the model is in order."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any


class SaveRequests:
    """Notes the first of each signal, and puts the previous handler back, so that a second one does what it did before.

    Signal handlers of Python run on the main thread, between two instructions; so no lock is needed, and none would be safe.
    """

    def __init__(self) -> None:
        self.noted: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._handler: Callable[[int, FrameType | None], None] = self._handle  # one object, to recognise it by
        _alive.add(self)

    @property
    def listens(self) -> bool:
        """Whether a signal may ask for a save, or has done so."""
        return bool(self._previous or self.noted)

    def listen(self, number: signal.Signals) -> None:
        """Installs the handler. Raises ValueError on another thread than the main one, or if the present handler cannot be put back."""
        if number in self._previous:
            return
        previous = signal.getsignal(number)
        if previous is None:
            raise ValueError(
                f"the handler of {number.name} was not installed by Python, so it could not be put back; nothing was changed"
            )
        self._previous[number] = previous
        try:
            signal.signal(number, self._handler)
        except BaseException:
            del self._previous[number]
            raise

    def restore(self) -> None:
        """Puts all previous handlers back, but for those that someone else has replaced since."""
        for number in list(self._previous):
            self._put_back(number)
        self._previous.clear()

    def _put_back(self, number: signal.Signals) -> None:
        if signal.getsignal(number) is self._handler:
            signal.signal(number, self._previous[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        if os.getpid() == self._pid and which in self._previous and which not in self.noted:
            self._put_back(which)
            self.noted.append(which)
            return
        self._pass_on(which, frame)

    def _pass_on(self, number: signal.Signals, frame: FrameType | None) -> None:
        """Does what the previous handler does: if a later handler, or one in a forked child, calls this one."""
        previous = self._previous.get(number, signal.SIG_DFL)
        if callable(previous):
            previous(number, frame)
        elif previous == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_alive: weakref.WeakSet[SaveRequests] = weakref.WeakSet()


def _restore_in_child() -> None:
    """Puts the previous handlers back in a forked child, such as a worker of a data loader, which a signal must be able to end."""
    for requests in list(_alive):
        requests.restore()


os.register_at_fork(after_in_child=_restore_in_child)
