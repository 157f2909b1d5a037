"""Tensors in memory-mapped files: private, and read from disk on access."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import torch

from shardsave._common.assembled import Assembled, Chunk
from shardsave._format.dtypes import BY_NAME, item_bytes, torch_shape
from shardsave._storage.checkpoint import Checkpoint
from shardsave._storage.located import Located
from shardsave._storage.mapping import map_file
from shardsave.errors import CorruptCheckpointError


class Maps:
    """The shards of an open checkpoint, each mapped once, when one of its tensors is first needed.

    A mapping has its own descriptor and lives as long as a tensor in it. ``aligned``: unaligned tensors are copied. If False,
    nothing is copied, and only the bytes of an unaligned tensor may be used, not its values.
    """

    def __init__(self, checkpoint: Checkpoint, *, aligned: bool = True) -> None:
        self._checkpoint = checkpoint
        self._aligned = aligned
        self._mapped: dict[str, mmap.mmap] = {}

    def tensor(self, t: Located) -> torch.Tensor:
        """The whole tensor; copied only if a third-party file stores it unaligned, or if it is in several chunks."""
        dtype, shape = BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape)
        if t.nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        if t.chunks:
            whole = torch.empty(shape, dtype=dtype, device="cpu")
            self.assembled(t).gather(0, whole.reshape(-1).view(torch.uint8).numpy().data)
            return whole
        raw = self._bytes(t)
        return (raw if _is_aligned(t) or not self._aligned else raw.clone()).view(dtype).view(shape)

    def assembled(self, t: Located) -> Assembled:
        """A tensor in several chunks, as a source that copies nothing."""
        chunks = [Chunk(begin, self._bytes(c).view(BY_NAME[c.dtype].torch).view(c.shape)) for begin, c in t.chunks]
        return Assembled(BY_NAME[t.dtype].torch, t.shape, chunks)

    def tensors(self, chosen: Mapping[str, Located]) -> dict[str, torch.Tensor]:
        """Maps all of ``chosen``, or none: on an error the mappings are dropped, since its traceback would keep their descriptors open."""
        tensors: dict[str, torch.Tensor] = {}
        try:
            for name, t in chosen.items():
                tensors[name] = self.tensor(t)
        except BaseException:
            tensors.clear()
            self.close()
            raise
        return tensors

    def part(self, t: Located, index: Any) -> torch.Tensor:
        """``tensor(t)[index]``; if the tensor is unaligned, only this part is copied."""
        if t.chunks or _is_aligned(t) or t.nbytes == 0:
            return self.tensor(t)[index]
        dtype, shape = BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape)
        rows = self._bytes(t).view(*shape, dtype.itemsize)
        indices = index if isinstance(index, tuple) else (index,)
        all_bytes = slice(None) if any(i is Ellipsis for i in indices) else Ellipsis  # the bytes of an element stay together
        index = (*indices, all_bytes)
        return rows[index].clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return tuple(self._mapped.values())

    def close(self) -> None:
        """Forgets the mappings; tensors in them stay valid."""
        self._mapped.clear()

    def _bytes(self, t: Located) -> torch.Tensor:
        if t.shard not in self._mapped:
            self._mapped.setdefault(t.shard, self._map(t.shard))
            self._checkpoint.drop(t.shard)
        mapping = self._mapped[t.shard]
        if len(mapping) < t.offset + t.nbytes:
            raise CorruptCheckpointError(
                f"corrupt shard {t.shard}: tensor {t.name!r} was expected to end at {t.offset + t.nbytes}, the file has "
                f"{len(mapping)} bytes; it was cut while the checkpoint was open"
            )
        return torch.frombuffer(mapping, dtype=torch.uint8, count=t.nbytes, offset=t.offset)

    def _map(self, shard: str) -> mmap.mmap:
        try:
            return map_file(self._checkpoint.descriptor(shard), self._checkpoint.path_of(shard))
        except ValueError:  # the file is empty
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: data was expected, the file is empty; it was cut while the checkpoint was open"
            ) from None


def _is_aligned(t: Located) -> bool:
    """Whether a tensor can use the bytes in place: torch needs alignment, and third-party files do not always have it."""
    return t.offset % item_bytes(t.dtype) == 0
