"""Reads files of ``torch.save``: archives, and the format before version 1.6. Nothing that a pickle names is run.

The tensors are views of the mapped file.
"""

from __future__ import annotations

import io
import mmap
import os
from typing import Any, NamedTuple

import torch

from shardsave._common.os_calls import CallFailed, call, read_at
from shardsave._foreign.pickle_refusals import refuse_damaged
from shardsave._foreign.pickled_tensors import Allowed, Names, Storage, storage_of
from shardsave._foreign.placing import Placing
from shardsave._foreign.torch_archive import Archive
from shardsave._foreign.torch_pickle import Window, read_pickle
from shardsave._format.other_kinds import START_BYTES, ZIP
from shardsave._storage.find import cannot_read, open_checkpoint_file, refuse_other_kind
from shardsave._storage.mapping import map_file
from shardsave.errors import CheckpointNotFoundError

#: The second pickle of a file in the old format.
_OLD_VERSION = 1001


class TorchFile(NamedTuple):
    """What a file holds. ``content`` is any nesting of dicts and lists; its plain tensors are views of ``mappings``."""

    content: Any
    mappings: tuple[mmap.mmap, ...]
    notes: tuple[str, ...]


def read_torch_file(path: str, allowed: Allowed | None = None) -> TorchFile:
    """Reads what ``torch.save`` wrote to ``path``; names in its pickle that are ``allowed`` become records too.

    Raises CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError.
    """
    file = open_checkpoint_file(path, os.path.basename(path))
    if file is None:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: No such file or directory")
    with file:
        try:
            length = call(os.fstat, path, file.fd).st_size
            start = read_at(file.fd, START_BYTES, 0)
        except CallFailed as error:
            raise cannot_read(path, error) from error
        if not length:
            refuse_damaged(path, "it is empty")
        refuse_other_kind(start, os.path.basename(path), path, "a file of torch.save")
        mapping = map_file(file.fd, path)
        if start.startswith(ZIP):
            archive = Archive(file.fd, mapping, 0, length, path)
            content, notes = archive.content(Names(allowed)), archive.notes()
        else:
            content, notes = _read_old_format(file.fd, mapping, length, Names(allowed), path), ()
    return TorchFile(content, (mapping,), notes)


def _read_old_format(fd: int, mapping: mmap.mmap, length: int, names: Names, path: str) -> Any:
    """The content of a file as torch wrote it before version 1.6: a few pickles, then the bytes of all storages."""
    file = io.BufferedReader(Window(fd, 0, length))
    storages: dict[str, Storage] = {}

    def remembered(saved_id: Any) -> Storage:
        storage = storage_of(saved_id)
        return storages.setdefault(storage.key, storage)._replace(begin=storage.begin)

    read_pickle(file, names, path, first=True)
    if read_pickle(file, names, path) != _OLD_VERSION:
        refuse_damaged(path, "it is a pickle that torch.save did not write")
    # Sizes of C types on the machine that wrote it; torch writes the data as if these were the usual ones.
    read_pickle(file, names, path)
    content = read_pickle(file, names, path, remembered)
    keys = read_pickle(file, names, path)
    offsets, at = {}, file.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        elements = int.from_bytes(mapping[at : at + 8], "little")
        if storage is None or elements * storage.dtype.itemsize != storage.nbytes or at + 8 + storage.nbytes > length:
            refuse_damaged(path, f"the storage {key!r:.40} was expected at {at}, it is not there or was cut")
        offsets[key], at = at + 8, at + 8 + storage.nbytes

    def bytes_of(storage: Storage) -> torch.Tensor:
        if storage.key not in offsets:
            refuse_damaged(path, f"the storage {storage.key!r:.40} was expected, it is not there")
        return torch.frombuffer(mapping, dtype=torch.uint8, count=storage.nbytes, offset=offsets[storage.key])

    try:
        return Placing(bytes_of, path).place(content)
    except RecursionError:
        refuse_damaged(path, "it holds containers nested too deeply, or in themselves")
