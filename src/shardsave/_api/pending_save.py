"""`PendingSave`: what `save_async` returns while the save goes on."""

from __future__ import annotations

import threading

from shardsave._api.arguments import check_timeout
from shardsave._api.reports import SaveReport
from shardsave._background.flight import Flight
from shardsave.errors import ShardSaveError


class PendingSave:
    """A save that goes on in the background. Any thread may call any method, any number of times.

    A save that fails raises nothing in the training: the error is raised by `wait`, returned by `exception`, logged once, and told in the
    notes of the next save. After a fork, the object in the child is over, since the parent saves: there, `wait` raises a ShardSaveError.
    """

    def __init__(self, flight: Flight[SaveReport]) -> None:
        self._flight = flight

    @property
    def path(self) -> str:
        """The directory, as it was passed."""
        return self._flight.path

    @property
    def staged(self) -> threading.Event:
        """Set when every tensor has been taken, so that anything may be done to the model; also set when the save is over, or fails."""
        return self._flight.staged

    @property
    def skipped(self) -> bool:
        """Whether nothing is saved, since another save was in flight (``if_busy="skip"``)."""
        return self._flight.skipped

    def done(self) -> bool:
        """Whether the save is over: it succeeded, failed, was cancelled or skipped."""
        return self._flight.ended or self._flight.is_foreign

    def exception(self) -> BaseException | None:
        """Why the save failed. None if it did not, and also as long as it goes on: this does not wait."""
        if self._flight.is_foreign:
            return self._foreign()
        return self._flight.tell_error()

    def cancel(self) -> bool:
        """Ends the save, so that nothing is committed: `wait` then raises SaveCancelledError. Does not wait for the end.

        Returns False, and changes nothing, from the attempt to commit on, and if the save is over.
        """
        return self._flight.cancel()

    def wait(self, timeout: float | None = None) -> SaveReport:
        """Waits until the save is over, and returns its report.

        Ctrl-C while it waits raises KeyboardInterrupt, and the save goes on.

        Raises:
            TimeoutError: that took longer than ``timeout`` seconds; the save goes on.
            SaveCancelledError: it was cancelled; nothing was committed.
            whatever `save` raises: the save failed.
            ShardSaveError: also in a forked child, for a save of its parent, and in a callback of the save itself.
        """
        if timeout is not None:
            check_timeout(timeout, "timeout")
        if self._flight.is_foreign:
            raise self._foreign()
        if self.is_of_this_thread:
            raise ShardSaveError(
                f"cannot wait for the save of {self.path}: another thread was expected, this one saves (in a callback); it goes on"
            )
        if not self._flight.wait_ended(timeout):
            raise TimeoutError(f"the save of {self.path} was expected to end within {timeout:g} s; it goes on")
        if (error := self._flight.tell_error()) is not None:
            try:
                raise error.with_traceback(None)
            finally:
                del self, error  # the traceback holds this frame
        return self._flight.result()

    def wait_ended(self, timeout: float) -> bool:
        """Waits until the save is over, however it ends; for a manager. Returns False after ``timeout`` seconds."""
        return self._flight.wait_ended(timeout)

    @property
    def is_of_this_thread(self) -> bool:
        """Whether the calling thread is the one that saves, in a callback, and would wait for itself."""
        return self._flight.is_of_this_thread and not self.done()

    @property
    def is_untold(self) -> bool:
        """Whether the save has failed and nobody has learnt why, by `wait` or `exception`; for a manager."""
        return self._flight.error is not None and not self._flight.told and not self._flight.is_foreign

    def _foreign(self) -> ShardSaveError:
        return ShardSaveError(
            f"cannot wait for the save of {self.path}: a save of this process was expected, it belongs to process {self._flight.pid}, "
            f"from which this one was forked; that one goes on with it"
        )

    def __repr__(self) -> str:
        state = "running" if not self.done() else "failed" if self._flight.error is not None else "done"
        return f"<PendingSave of {self.path!r}: {state}>"
