"""How the tensors of a checkpoint become the tensors of a module: the protocol, and the layout of a plain module.

Libraries that rename, fuse or split tensors on disk implement the protocol in `_huggingface`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from shardsave._storage.checkpoint import Located


class Join(NamedTuple):
    """Stored tensors that are converted together: several parts of one tensor of the module, or one tensor that
    contains several.

    ``targets``: names in the module. ``sources``: the stored tensors. ``convert``: values of the sources → values of the targets.
    """

    targets: tuple[str, ...]
    sources: tuple[Located, ...]
    convert: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]


class Beside(NamedTuple):
    """A stored tensor that the module keeps outside its state dict. ``memory`` returns the tensor to fill, and puts a new one in place if
    the module has none with memory."""

    located: Located
    memory: Callable[[], torch.Tensor]


class DiskLayout(Protocol):
    """What a load has to know about names and tensors on disk. It is computed from a module and a checkpoint, and then never changes."""

    @property
    def stored(self) -> Mapping[str, Located]:
        """Name in the module → stored tensor; stored tensors that the module does not have keep their names on disk.

        A target of a join has a `Located` without a shard, which only says its dtype and shape.
        """
        ...

    @property
    def joins(self) -> Sequence[Join]: ...

    @property
    def beside(self) -> Sequence[Beside]: ...

    def may_be_missing(self, name: str) -> bool:
        """Whether a checkpoint of this layout need not have the tensor ``name`` of the module."""
        ...

    def flags(self, on_disk: Mapping[str, bool]) -> Mapping[str, bool]:
        """Name in the module → frozen, from the flags that the checkpoint records."""
        ...

    def views(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Sequence[torch.Tensor] | None]:
        """For each join, a view for each of its sources into ``tensors`` (name in the module → tensor); None if there are no such views."""
        ...


class IdentityLayout:
    """The layout of a plain module: each tensor is stored under its own name."""

    def __init__(self, stored: Mapping[str, Located]) -> None:
        self.stored = stored
        self.joins: tuple[Join, ...] = ()
        self.beside: Sequence[Beside] = ()

    def may_be_missing(self, name: str) -> bool:
        return False

    def flags(self, on_disk: Mapping[str, bool]) -> Mapping[str, bool]:
        return on_disk

    def views(self, tensors: Mapping[str, torch.Tensor]) -> Sequence[Sequence[torch.Tensor] | None]:
        return []
