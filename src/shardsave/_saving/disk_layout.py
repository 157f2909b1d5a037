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

    def keeps(self, state: State) -> bool:
        """Whether names and tensors are those of ``state``, from which this was made, and there is nothing to say about it."""
        if self.module_flags is not None or self.single_file is not None or self.notes or self.copied_bytes:
            return False
        mine, other = self.state.entries, state.entries
        same = len(mine) == len(other) and all(a.source is b.source and a[:4] == b[:4] for a, b in zip(mine, other))
        return same and self.state.file_metadata == state.file_metadata


class DiskLayout(Protocol):
    """The layout on disk of one kind of model."""

    def apply(self, state: State, *, is_kept: bool = False) -> OnDisk:
        """Returns ``state``, whose entries have their names in the module, as it will be stored. Raises UnsupportedTensorError.

        ``is_kept``: another process has found that the result keeps the same state, which may take long to find.
        """

    def fingerprint(self) -> bytes:
        """What decides, beside the state, whether the result keeps it: only a process with the same one may say so to another."""


class IdentityLayout:
    """The layout that stores the names and tensors of the module or mapping as they are."""

    def apply(self, state: State, *, is_kept: bool = False) -> OnDisk:
        return OnDisk(state)

    def fingerprint(self) -> bytes:
        return b""
