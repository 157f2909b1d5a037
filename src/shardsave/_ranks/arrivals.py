"""Who waits for the other ranks of a group, and in which kind of call, as it stands in the store.

Calls of different kinds may run beside each other: a save in the background and the next load, for example. So each kind has keys of its
own. A rank that waits in another kind than rank 0 will come later, unless its main thread waits there, and that of rank 0 waits here: then
neither call can come about. `Elsewhere` finds these.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from shardsave._ranks.group import Members
from shardsave._ranks.store_connection import StoreConnection

#: What calls that save do.
SAVE = "save to"

#: Kind of a call → what it is called in addition to its verb: ordinary calls, saves in the background, the question whether one of those
#: is in flight, and what a manager asks rank 0 before it calls a verb.
_KINDS = {
    "": "",
    "background": " in the background (save_async)",
    "turn": " in the background (save_async) with if_busy='skip' or 'raise'",
    "run": " by a CheckpointManager",
}
#: Seconds between two looks for ranks that wait elsewhere. Whoever is there twice is not on its way.
_PAUSE = 0.5


class Call(NamedTuple):
    """What all ranks must do alike. ``kind``: calls of other kinds may run beside it."""

    verb: str
    where: str
    kind: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    @property
    def words(self) -> str:
        """With its kind."""
        return f"{self}{_KINDS.get(self.kind, '')}"

    def __str__(self) -> str:
        return f"{self.verb} {self.where}"


class Arrival(NamedTuple):
    """A rank that waits. ``number``: of the call on its main thread, 0 on another thread; see `number_of_call`. ``kind``: of the call,
    which the key says."""

    token: str
    call: str
    host: str
    host_name: str
    number: str = "0"
    kind: str = ""

    def packed(self) -> bytes:
        return " ".join(self[:-1]).encode()


def key_of(name: str, kind: str, rank: int) -> str:
    return f"{kind}{kind and '/'}{name}/{rank}"


class Answered:
    """The last token that each rank of a group was answered, on rank 0."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, int], str] = {}

    def note(self, rank: int, arrival: Arrival) -> None:
        self._tokens[arrival.kind, rank] = arrival.token

    def waiting(self, line: StoreConnection, kind: str, rank: int) -> Arrival | None:
        """``rank``, if it waits in a call of this kind."""
        value = line.peek(key_of("arrived", kind, rank))
        arrival = None if value is None else Arrival(*value.decode().split())._replace(kind=kind)
        return None if arrival is None or self._tokens.get((kind, rank)) == arrival.token else arrival


def waiting_elsewhere(line: StoreConnection, call: Call, rank: int, answered: Answered) -> Iterator[Arrival]:
    """``rank`` in each call of another kind than that of ``call`` in which it waits."""
    arrivals = (answered.waiting(line, kind, rank) for kind in _KINDS if kind != call.kind)
    return (arrival for arrival in arrivals if arrival is not None)


class Elsewhere:
    """The ranks that wait in calls of other kinds and cannot come to this one, as rank 0 sees them."""

    def __init__(self, line: StoreConnection, call: Call, number: int, answered: Answered) -> None:
        """``number``: of this call, see `number_of_call`."""
        self._line = line
        self._call = call
        self._number = str(number)
        self._answered = answered
        self._seen: dict[int, str] = {}
        self._found = False
        self._next = time.monotonic() + _PAUSE

    def look(self, rank: int) -> Arrival | None:
        """``rank``, if it waits elsewhere and cannot come. In most calls nobody is late enough for a look."""
        if self._number == "0" or (time.monotonic() < self._next and not self._found):
            return None
        self._next = time.monotonic() + _PAUSE
        for arrival in waiting_elsewhere(self._line, self._call, rank, self._answered):
            if arrival.number == self._number:
                self._found = self._found or self._seen.get(rank) == arrival.token
                self._seen[rank] = arrival.token
                return arrival if self._found else None
        return None


def number_of_call(members: Members, *, on_main_thread: bool) -> int:
    """How many calls of the group the main thread has begun since the last one in which all met, with this one; 0 on another thread.

    Ranks that make the same calls have the same number; whose number differs is behind, and may come after the call in which it waits.
    """
    if not on_main_thread:
        return 0
    place = members.key, members.rank
    _begun[place] = _begun.get(place, 0) + 1
    return _begun[place]


def all_met(members: Members, number: int) -> None:
    """Notes that all ranks have met in the call of this number."""
    if number:
        _begun.pop((members.key, members.rank), None)


#: By group and rank, for `number_of_call`.
_begun: dict[tuple[str, int], int] = {}
os.register_at_fork(after_in_child=_begun.clear)
