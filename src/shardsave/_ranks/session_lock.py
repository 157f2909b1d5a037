"""At most one session of a group and kind at a time in a process: two would take each other's places in the meeting."""

from __future__ import annotations

import os

from shardsave._ranks.group import Members


class SessionLock:
    """Says that a thread of this process is in a call of a group. ``kind``: of the call; those of different kinds may run together."""

    def __init__(self, members: Members, kind: str, text: str) -> None:
        self._key = (members.key, kind, members.rank)
        self.text = text

    def take(self) -> str | None:
        """What holds the group, or None if it is this ticket now."""
        holder = _running.setdefault(self._key, self)
        return None if holder is self else holder.text

    def give_back(self) -> None:
        if _running.get(self._key) is self:
            _running.pop(self._key, None)


_running: dict[tuple[str, str, int], SessionLock] = {}
os.register_at_fork(after_in_child=_running.clear)
