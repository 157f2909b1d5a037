"""`open`: a checkpoint as a mapping from names to tensors, none of which is read before it is looked at."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch

from shardsave._api.arguments import check_path
from shardsave._common.shutdown import verb
from shardsave._format.dtypes import BY_NAME, torch_shape
from shardsave._loading.mapped import Maps
from shardsave._storage.checkpoint import Checkpoint, Located, open_checkpoint
from shardsave.errors import IncompatibleCheckpointError

__all__ = ["OpenCheckpoint", "TensorSlice", "open"]


class NoSuchTensorError(IncompatibleCheckpointError, KeyError):
    """A name that the checkpoint does not have: what this package raises for it, and what a mapping has to raise."""

    __str__ = Exception.__str__


class OpenCheckpoint(Mapping[str, torch.Tensor]):
    """An open checkpoint: a mapping from names, tied ones too, to tensors on the CPU, in the order of the index.

    ``ckpt["name"]`` is a tensor that lies in the mapped file: nothing is copied, and the disk is read where the tensor is
    looked at. It may be written to, which changes neither the file nor what other processes see, but every other tensor that
    this object gives for the same bytes. Nothing is verified; `load` and `verify` do that.

    All shards are opened and their headers checked at once, so what is read is one save, whatever is saved there meanwhile.
    Tensors stay valid when the checkpoint is closed; asking for another is a ``ValueError`` then. May be used by several threads,
    and by forked children for as long as no save replaces the files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps = Maps(checkpoint)
        self._stored = {name: name for name in checkpoint.stored_names} | dict(checkpoint.ties)
        self._closed = False

    @property
    def path(self) -> str:
        """The path that was opened."""
        return self._checkpoint.path

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, tied ones too, in the order of the index."""
        return tuple(self._stored)

    @property
    def frozen(self) -> frozenset[str] | None:
        """The parameters that were frozen; None where that is unknown, as with files of others."""
        flags = self._checkpoint.flags
        return frozenset(name for name, frozen in flags.items() if frozen) if flags is not None else None

    @property
    def ties(self) -> Mapping[str, str]:
        """Tied name → the name under which the bytes are stored."""
        return dict(self._checkpoint.ties)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was given to `save` as ``metadata``."""
        return dict(self._checkpoint.metadata)

    @property
    def closed(self) -> bool:
        return self._closed

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, mapped. Raises IncompatibleCheckpointError, which is a KeyError here, for a name that is not there."""
        located = self._located(name)
        self._refuse_if_closed(name)
        return self._maps.tensor(located)

    def slice(self, name: str) -> TensorSlice:
        """The tensor ``name`` before it is mapped: its shape and dtype, and any part of it by indexing.

        Raises IncompatibleCheckpointError, which is a KeyError here, for a name that is not there.
        """
        return TensorSlice(self, self._located(name))

    def _part(self, located: Located, index: Any) -> torch.Tensor:
        self._refuse_if_closed(located.name)
        return self._maps.part(located, index)

    def _located(self, name: str) -> Located:
        if name in self._stored:
            return self._checkpoint.tensors[self._stored[name]]
        close = difflib.get_close_matches(name, self._stored, n=1) if isinstance(name, str) else []
        hint = f" (the closest is {close[0]!r})" if close else ""
        raise NoSuchTensorError(
            f"cannot read from {self.path}: {name!r} was asked for{hint}, the checkpoint has no tensor of that name"
        )

    def _refuse_if_closed(self, name: str) -> None:
        if self._closed:
            raise ValueError(
                f"cannot read {name!r} from {self.path}: an open checkpoint was expected, it was closed; "
                f"tensors that were asked for before are still valid"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    # Two are equal when they are the same object: a mapping's own comparison would read every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<shardsave.OpenCheckpoint {self.path}: {len(self)} names{', closed' if self._closed else ''}>"

    def close(self) -> None:
        """Closes the files; may be called any number of times."""
        self._closed = True
        self._maps.close()
        self._checkpoint.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class TensorSlice:
    """A tensor of an open checkpoint that is read by parts: ``ckpt.slice("name")[0:10]`` is what ``ckpt["name"][0:10]`` is.

    The difference shows in files of others whose tensors are not aligned and have to be copied: here only the part is.
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
        """The part that ``index`` takes of a tensor: numbers, slices, ``...``, ``None``, in a tuple for several dimensions."""
        return self._owner._part(self._located, index)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"tensor {self._located.name!r} has no length, it is a scalar")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<shardsave.TensorSlice {self._located.name!r}: {self.dtype}, {self.shape}>"


@verb()
def open(path: str | os.PathLike[str]) -> OpenCheckpoint:
    """Opens a directory, an index or one safetensors file for reading tensors one by one, without reading them all.

    Reads the index and the headers. Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError,
    DirectoryBusyError.

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
    return OpenCheckpoint(open_checkpoint(path))
