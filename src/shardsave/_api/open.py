"""`open`: a checkpoint as a mapping from names to tensors; each is memory-mapped, and read from disk on access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from shardsave._api.arguments import check_path
from shardsave._api.operators import check_operators
from shardsave._common.shutdown import verb
from shardsave._common.uncompiled import uncompiled
from shardsave._common.warn_caller import warn_caller
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.mapped import Maps
from shardsave._loading.selection import closest, stored_names
from shardsave._printable import printable
from shardsave._storage.checkpoint import Checkpoint, Located
from shardsave._storage.open_checkpoint import open_checkpoint
from shardsave.errors import NoSuchTensorError

__all__ = ["OpenCheckpoint", "TensorSlice", "open"]


class OpenCheckpoint(Mapping[str, torch.Tensor]):
    """An open checkpoint: a mapping from names, tied names too, to tensors on the CPU, in the order of the index.

    ``ckpt["name"]`` is a tensor in the mapped file: nothing is copied, and the disk is read when the values are accessed. You may
    write to it: neither the file nor other processes see the change, but every other tensor that this object returns for the same
    bytes does. Nothing is verified; use `load` or `verify` for that.

    All shards are opened and their headers checked when the checkpoint is opened, so all tensors are from one save, even if another
    save replaces the files meanwhile. Tensors stay valid after `close`; reading another one then raises ``ValueError``. Several
    threads may use the object, and so may forked children. If a save has replaced the files, a shard that has to be opened again
    raises DirectoryBusyError: in a forked child, or if there are more shards than files that can be open.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps = Maps(checkpoint)
        self._stored = stored_names(checkpoint)
        self._closed = False

    @property
    def path(self) -> str:
        """The absolute path that was opened."""
        return self._checkpoint.path

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, tied names too, in the order of the index."""
        return tuple(self._stored)

    @property
    def frozen(self) -> frozenset[str] | None:
        """The frozen parameters; None if the files do not record flags, as with third-party files."""
        flags = self._checkpoint.flags
        return frozenset(name for name, frozen in flags.items() if frozen) if flags is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which the bytes are stored."""
        return dict(self._checkpoint.ties)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The ``metadata`` passed to `save`; for a single file of another tool, the strings in its ``__metadata__``."""
        return dict(self._checkpoint.metadata)

    @property
    def closed(self) -> bool:
        return self._closed

    @uncompiled
    def __getitem__(self, name: str) -> torch.Tensor:
        """The memory-mapped tensor. Raises NoSuchTensorError, which is also a KeyError, if there is no such name."""
        located = self._located(name)
        self._check(name)
        return self._maps.tensor(located)

    def slice(self, name: str) -> TensorSlice:
        """The tensor ``name``, not yet mapped: it has a shape and a dtype, and indexing returns any part of it.

        Raises NoSuchTensorError, which is also a KeyError, if there is no such name.
        """
        return TensorSlice(self, self._located(name))

    @uncompiled
    def _part(self, located: Located, index: Any) -> torch.Tensor:
        self._check(located.name)
        return self._maps.part(located, index)

    def _located(self, name: str) -> Located:
        if name in self._stored:
            return self._checkpoint.tensors[self._stored[name]]
        hint = closest(name, self._stored) if isinstance(name, str) else ""
        raise NoSuchTensorError(
            f"cannot read from {self.path}: {name!r} was asked for{hint}, the checkpoint has no tensor of that name"
        )

    def _check(self, name: str) -> None:
        """Raises the error for a tensor that cannot be read now."""
        check_operators(f"read {name!r} from", self.path, "nothing was read")
        if self._closed:
            raise ValueError(
                f"cannot read {name!r} from {printable(self.path)}: an open checkpoint was expected, it was closed; "
                f"tensors that were asked for before are still valid"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    # Equality is identity, because the comparison of `Mapping` would read every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<shardsave.OpenCheckpoint {printable(self.path)}: {len(self)} names{', closed' if self._closed else ''}>"

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        self._closed = True
        self._maps.close()
        self._checkpoint.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TensorSlice:
    """A tensor of an open checkpoint that is read in parts: ``ckpt.slice("name")[0:10]`` equals ``ckpt["name"][0:10]``.

    This matters for third-party files with unaligned tensors, which have to be copied: a slice copies only the part.
    """

    def __init__(self, owner: OpenCheckpoint, located: Located) -> None:
        self._owner = owner
        self._located = located

    @property
    def shape(self) -> tuple[int, ...]:
        return torch_shape(self._located.dtype, self._located.shape)

    @property
    def dtype(self) -> torch.dtype:
        return BY_NAME[self._located.dtype].torch

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The indexed part: ``index`` is a number, a slice, ``...`` or ``None``, or a tuple of these for several dimensions."""
        return self._owner._part(self._located, index)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"tensor {self._located.name!r} has no length, it is a scalar")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<shardsave.TensorSlice {self._located.name!r}: {self.dtype}, {self.shape}>"


@uncompiled
@verb()
def open(path: str | os.PathLike[str]) -> OpenCheckpoint:
    """Opens a directory, an index or one safetensors file lazily: tensors are memory-mapped and read on access.

    Reads only the index and the headers. Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError,
    DirectoryBusyError.

    Never collective: a rank that calls it waits for no other.

    Example:
        >>> import torch, shardsave
        >>> report = shardsave.save({"x": torch.arange(6).view(3, 2)}, "numbers")
        >>> with shardsave.open("numbers") as ckpt:
        ...     names, part = list(ckpt), ckpt.slice("x")[1:]
        >>> names, part
        (['x'], tensor([[2, 3],
                [4, 5]]))
    """
    check_path(path)
    checkpoint = open_checkpoint(path)
    try:
        for note in checkpoint.shape_notes:
            warn_caller(note)
    except BaseException:
        checkpoint.close()
        raise
    return OpenCheckpoint(checkpoint)
