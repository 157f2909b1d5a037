"""Compares what must be the same on all ranks that save: arguments, and what each tensor is on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from shardsave._common.words import some
from shardsave._ranks.unequal import Difference, different_tensors, first_difference, told
from shardsave._saving.job import LAYOUT

if TYPE_CHECKING:
    from shardsave._ranks.session import Session

#: If the layouts of ranks differ, so many kinds of them are shown.
_MOST_KINDS = 3


class Unequal(Exception):
    """What is not the same on all ranks, in words."""


def check_equal(session: Session, arguments: Mapping[str, object], tensors: Callable[[], Mapping[str, str]] | None) -> None:
    """Raises Unequal on rank 0 if ``arguments`` are not the same on all ranks, as `told` takes them.

    ``tensors``: as `Job.check_equal` says; None if all ranks have the same, whatever the layout. With it, all ranks wait for rank 0.
    """
    found = first_difference(session.gather("arguments", told(arguments)) or ())
    if found is not None and (tensors is None or found.name != LAYOUT):
        raise Unequal(found.words(session.name))
    if tensors is not None:
        _compare_layouts(session, found, tensors)


def _compare_layouts(session: Session, found: Difference | None, tensors: Callable[[], Mapping[str, str]]) -> None:
    """Names the tensors that differ. One rank of each kind says what it has, only if something was ``found``."""
    kinds = [*found.ranks.values()][:_MOST_KINDS] if found is not None else []
    first = json.dumps([ranks[0] for ranks in kinds]).encode() if session.leads else None
    asked = json.loads(session.publish("ranks whose layouts differ", first))
    if not asked:
        return
    everywhere = session.gather("tensors on disk", json.dumps(tensors()).encode() if session.rank in asked else b"")
    if everywhere is None or found is None:
        return  # this rank is told with its next step
    words = different_tensors([(some(map(session.name, ranks)), json.loads(everywhere[ranks[0]])) for ranks in kinds])
    raise Unequal(found.words(session.name) if words is None else f"the same {LAYOUT} was expected on all ranks, {words}")
