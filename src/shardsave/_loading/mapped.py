"""Tensors that lie in the files themselves: mapped, private, and read only when they are looked at."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import torch

from shardsave._format.dtypes import BY_NAME, item_bytes, torch_shape
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave._storage.mapping import map_file
from shardsave.errors import CorruptCheckpointError


class Maps:
    """The shards of an open checkpoint, each mapped once, when a tensor of it is first asked for.

    A mapping has a descriptor of its own and lives as long as a tensor in it. Without ``aligned`` no tensor is copied, also where
    only its bytes may be looked at.
    """

    def __init__(self, checkpoint: Checkpoint, *, aligned: bool = True) -> None:
        self._checkpoint = checkpoint
        self._aligned = aligned
        self._mapped: dict[str, mmap.mmap] = {}

    def tensor(self, t: Located) -> torch.Tensor:
        """The whole tensor. One that others stored across its alignment is copied, any other not."""
        dtype, shape = BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape)
        if t.nbytes == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = self._bytes(t)
        return (raw if _is_aligned(t) or not self._aligned else raw.clone()).view(dtype).view(shape)

    def tensors(self, chosen: Mapping[str, Located]) -> dict[str, torch.Tensor]:
        """All of them, or none: each mapping has a descriptor, and the traceback of an error would keep what is here."""
        made: dict[str, torch.Tensor] = {}
        try:
            for name, t in chosen.items():
                made[name] = self.tensor(t)
        except BaseException:
            made.clear()
            self.close()
            raise
        return made

    def part(self, t: Located, index: Any) -> torch.Tensor:
        """``tensor(t)[index]``, of which only that part is copied where it has to be."""
        if _is_aligned(t) or t.nbytes == 0:
            return self.tensor(t)[index]
        dtype, shape = BY_NAME[t.dtype].torch, torch_shape(t.dtype, t.shape)
        rows = self._bytes(t).view(*shape, dtype.itemsize)
        given = index if isinstance(index, tuple) else (index,)
        inside = slice(None) if any(i is Ellipsis for i in given) else Ellipsis  # an element's bytes stay together
        index = (*given, inside)
        return rows[index].clone(memory_format=torch.contiguous_format).view(dtype).squeeze(-1)

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return tuple(self._mapped.values())

    def close(self) -> None:
        """Forgets the mappings; tensors in them stay what they are."""
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
        except ValueError:  # nothing is left to map
            raise CorruptCheckpointError(
                f"corrupt shard {shard}: data was expected, the file is empty; it was cut while the checkpoint was open"
            ) from None


def _is_aligned(t: Located) -> bool:
    """Others do not always align; a tensor must be."""
    return t.offset % item_bytes(t.dtype) == 0
