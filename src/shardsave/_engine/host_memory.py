"""Host memory for a snapshot: page aligned, allocated once and used again and again, pinned for CUDA devices if that is possible."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from shardsave._common import backend
from shardsave._engine.transfer import out_of_memory

if TYPE_CHECKING:
    from shardsave._native import HostMemory as NativeMemory


class HostMemory:
    """``nbytes`` of memory. ``device``: the ordinal of a CUDA device for which it is to be pinned, or -1. Raises TransferFault.

    ``pinned``: whether it is pinned, for all devices. ``note``: why it is not, although that was wanted; empty otherwise. A forked child
    does not have the memory, and what it does with this object changes nothing.
    """

    def __init__(self, nbytes: int, *, device: int = -1) -> None:
        self.nbytes = nbytes
        self.pinned = False
        self._owner = os.getpid()
        memory, refusal = self._allocate(max(nbytes, 1), device)
        self.note = f"memory for a snapshot could not be pinned ({refusal})" if refusal else ""
        self._view: memoryview | None = memoryview(memory)[:nbytes]

    @property
    def view(self) -> memoryview:
        """The memory as writable bytes."""
        if self._view is None or os.getpid() != self._owner:
            raise ValueError("this memory was closed, or belongs to the process that forked this one")
        return self._view

    def close(self) -> None:
        """Gives up the memory, which is freed with the last view of it."""
        self._view = None

    def _allocate(self, nbytes: int, device: int) -> tuple[mmap.mmap | NativeMemory, str]:
        """The memory, and why it is not pinned for ``device``."""
        if backend.native is None:
            # Not kept from forked children: a child frees its copy, so the memory must be there.
            try:
                memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise out_of_memory("mmap of memory for a snapshot", nbytes) from error
            return memory, "the portable engine pins no memory" if device >= 0 else ""
        from shardsave._engine import native

        mapped = native.host_memory(nbytes, device)
        self.pinned = mapped.pinned
        refusal = mapped.refusal
        if device >= 0 and not self.pinned and not refusal:
            refusal = "it is no device of CUDA's driver"
        return mapped, refusal
