"""The interface between a save and the libraries whose conventions it follows: how a model's state is laid out on disk.

A layout is chosen once for each save. It renames and splits tensors, names the files that belong beside the weights, and says
whether the weights must be one file. Implementations that know a library are in ``_huggingface``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from shardsave._state.module import State


class OnDisk(NamedTuple):
    """A state as it will be stored.

    ``state``: entries by their names on disk. ``companions``: file name → content of the files beside the weights.
    ``module_flags``: name in the module → frozen, where the names on disk differ from these; else None. ``single_file``: a file
    name under which all weights must be found as one file; None where they may be sharded.
    """

    state: State
    companions: Mapping[str, bytes] = {}
    module_flags: Mapping[str, bool] | None = None
    single_file: str | None = None
    notes: tuple[str, ...] = ()


class DiskLayout(Protocol):
    """How one kind of model is laid out on disk."""

    def apply(self, state: State) -> OnDisk:
        """Returns ``state``, whose names are those in the module, as it will be stored. Raises UnsupportedTensorError."""


class IdentityLayout:
    """Names and tensors on disk are those of the module or mapping."""

    def apply(self, state: State) -> OnDisk:
        return OnDisk(state)
