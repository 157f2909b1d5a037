"""What the thread of a session and the threads that use it share. Every access is one operation, without a lock: an interrupt could
leave one locked.
"""

from __future__ import annotations

from collections import deque
from queue import SimpleQueue
from typing import NamedTuple

from shardsave._ranks.failures import Failure, StoreLost, unpacked
from shardsave._ranks.log import END, FAILURE, Entry
from shardsave._ranks.sockets import Bell


class Command(NamedTuple):
    """What the session wants of its thread: ``verb`` is "value", "publish", "fail", "late" or "close"."""

    verb: str
    phase: int = 0
    value: bytes = b""
    failure: Failure | None = None


class Mailbox:
    """One for each session."""

    def __init__(self) -> None:
        # written by the thread
        self.published: dict[int, bytes] = {}
        self.gathered: dict[int, list[bytes]] = {}
        self.failure: Failure | None = None
        self.over = False
        self.late: list[int] | None = None
        self.lost: StoreLost | None = None
        self.broken: BaseException | None = None
        self.news: SimpleQueue[None] = SimpleQueue()
        # written by the session
        self._commands: deque[Command] = deque()
        self.bell = Bell()

    def command(self, command: Command) -> None:
        self._commands.append(command)
        self.bell.ring()

    def take_command(self) -> Command | None:
        return self._commands.popleft() if self._commands else None

    def deliver(self, entry: Entry) -> None:
        if entry.kind == FAILURE:
            self.failure = unpacked(entry.value)
        elif entry.kind == END:
            self.over = True
        else:
            self.published[entry.phase] = entry.value
        self.news.put(None)
