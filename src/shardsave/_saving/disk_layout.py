"""The layout of a model's state on disk: the interface between a save and the libraries whose conventions it follows.

Each save chooses one layout. It renames, splits and joins tensors, supplies the files that belong beside the weights, and says
whether the weights must be one file. The layouts of libraries are in ``_huggingface``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from shardsave._state.module import State


class OnDisk(NamedTuple):
    """A state as it will be stored.

    ``state``: its entries have their names on disk. ``companions``: file name → content, for the files beside the weights.
    ``module_flags``: name in the module → frozen; None if the names on disk are the same. ``single_file``: the name of the one file
    that must hold all weights, or those called ``in_single_file``; None if all may be sharded. ``notes``: for the report.
    ``copied_bytes``: of tensors that had to be copied in memory.
    """

    state: State
    companions: Mapping[str, bytes] = {}
    module_flags: Mapping[str, bool] | None = None
    single_file: str | None = None
    in_single_file: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
    copied_bytes: int = 0


class DiskLayout(Protocol):
    """The layout on disk of one kind of model."""

    def apply(self, state: State) -> OnDisk:
        """Returns ``state``, whose entries have their names in the module, as it will be stored. Raises UnsupportedTensorError."""


class IdentityLayout:
    """The layout that stores the names and tensors of the module or mapping as they are."""

    def apply(self, state: State) -> OnDisk:
        return OnDisk(state)
