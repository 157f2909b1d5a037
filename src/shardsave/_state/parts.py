"""The parts of a checkpoint: what it holds beside its weights, so that a whole model can be restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shardsave._state.module import Entry


class Parts(NamedTuple):
    """The documents of an architecture and a program, and the extra tensors that all documents together refer to.

    ``documents``: role → JSON, as bytes. ``extra``: tensors that the weights do not contain (non-persistent buffers, constants).
    """

    documents: Mapping[str, bytes] = {}
    extra: tuple[Entry, ...] = ()
