"""Frees the disk space of removed files after the call that removed them has returned.

A file system frees a file when its last name and its last descriptor are gone, and whoever takes the last one waits for that: up to
0.2 s per GB. So a file is kept open while its name is removed, and a thread closes it later. Nothing can stay behind: the names are
gone at once, and if the process ends, however it ends, the operating system closes what is still open.

Threads: any. A forked child closes its copies of the descriptors right after the fork, as it does with every `Descriptor`.
"""

from __future__ import annotations

import _thread
import os
import time
from contextlib import suppress

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call, descriptor_allowance
from shardsave._common.shutdown import raise_if_ending
from shardsave._storage.directory import Directory

#: The most files that one save keeps open after it has returned; it waits for the rest.
_MOST_FILES = 256

_POLL_SECONDS = 0.001

#: The files that each thread frees; an empty list once it has.
_started: list[list[Descriptor]] = []


class RemovedFiles:
    """Removed files whose space is not free yet. It is free at the latest when this object is garbage. For one thread."""

    def __init__(self) -> None:
        self._files: list[Descriptor] = []
        self._most_files: int | None = None

    def unlink(self, folder: Directory, name: str) -> None:
        """Removes the name ``name``. If the file had no other one, its space stays in use until `free_later`. Raises CallFailed."""
        file = Descriptor()
        try:
            if len(self._files) < self._limit():
                with suppress(CallFailed):  # then the removal waits until the space is free
                    # O_PATH needs no permission to read, and opens nothing: neither a device nor a FIFO wakes up.
                    file.open(name, os.O_PATH | os.O_NOFOLLOW, folder.fd)
            folder.unlink(name)
            if file.fd >= 0 and _has_no_name(file, name):
                self._files.append(file)
        finally:
            if file not in self._files:
                file.abandon()

    def _limit(self) -> int:
        if self._most_files is None:
            self._most_files = min(_MOST_FILES, descriptor_allowance())
        return self._most_files

    def free_later(self) -> None:
        """Starts a thread that frees the space. If there can be no thread, frees it now."""
        files, self._files = self._files, []
        if not files:
            return
        try:
            # Not `threading.Thread`: an interrupt in its `start` can leave an object that keeps the files open for ever.
            _thread.start_new_thread(_free, (files,))
        except (RuntimeError, MemoryError):
            _free(files)
        else:
            _started.append(files)


def _free(files: list[Descriptor]) -> None:
    try:
        for file in files:
            file.abandon()  # a failure means nothing: the file has no name
    finally:
        files.clear()


def _has_no_name(file: Descriptor, name: str) -> bool:
    """Whether the open ``file`` has no name left. NFS keeps a removed file that is open under a name of its own: that one must go now."""
    try:
        return call(os.fstat, name, file.fd).st_nlink == 0
    except CallFailed:
        return False


def wait_until_freed(timeout: float | None = None) -> bool:
    """Waits until the space of all files that this process has removed is free. Returns False after ``timeout`` seconds.

    It polls, because a signal handler may save, and wait, while its own thread waits here: a lock could be held by that very thread.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    for files in list(_started):
        while files:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            raise_if_ending()
            time.sleep(_POLL_SECONDS)
        with suppress(ValueError):  # another thread waited too
            _started.remove(files)
    return True


os.register_at_fork(after_in_child=_started.clear)
