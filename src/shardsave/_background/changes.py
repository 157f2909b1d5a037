"""What a tensor was at one moment: enough to notice most changes later, at no cost."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Seen(NamedTuple):
    """A tensor as it was seen at one moment: its version (None for a tensor of inference mode, which has none), its address and the
    length of its storage in bytes.

    Not every change is noticed: fused optimizers, `Tensor.data`, numpy and the replay of a CUDA graph leave all three as they are.
    """

    tensor: torch.Tensor
    version: int | None
    address: int
    storage_bytes: int

    def change(self) -> str | None:
        """What has happened to the tensor since, in words; None if nothing is noticed."""
        address, storage_bytes = self.tensor.data_ptr(), self.tensor.untyped_storage().nbytes()
        if address != self.address:
            return "it got other memory"
        if storage_bytes != self.storage_bytes:
            return f"its storage was resized from {self.storage_bytes} to {storage_bytes} bytes"
        version = version_of(self.tensor)
        if version != self.version:
            return f"it was changed in place (its version was {self.version}, it is {version})"
        return None


def see(tensor: torch.Tensor) -> Seen:
    """``tensor`` as it is now."""
    return Seen(tensor, version_of(tensor), tensor.data_ptr(), tensor.untyped_storage().nbytes())


def version_of(tensor: torch.Tensor) -> int | None:
    """How often torch knows ``tensor`` to have been changed in place; None for a tensor of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
