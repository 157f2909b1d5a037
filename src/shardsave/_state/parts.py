"""What a checkpoint holds beside its weights so that more than weights can be restored from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shardsave._state.module import Entry


class Parts(NamedTuple):
    """An architecture, a program: each a document, and together the extra tensors that the documents refer to.

    ``documents``: role → JSON, as bytes. ``extra``: tensors that the weights do not contain (non-persistent buffers, constants).
    """

    documents: Mapping[str, bytes] = {}
    extra: tuple[Entry, ...] = ()
