"""Reads files of ``torch.save``: their pickle without running anything that it names, their tensors as views of the mapped file."""

from __future__ import annotations

import io
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from shardsave._common.os_calls import CallFailed, Descriptor, call, read_at
from shardsave._common.words import some
from shardsave._foreign.pickle_refusals import (
    refuse_damaged,
    refuse_long_pickle,
    refuse_names,
    refuse_plain_pickle,
    refuse_program,
)
from shardsave._foreign.pickled_tensors import Allowed, Names, Storage, storage_of
from shardsave._foreign.placing import Placing
from shardsave._foreign.unpickling import MAX_PICKLE_BYTES, Forbidden, Unpickler
from shardsave._format.other_kinds import START_BYTES, ZIP
from shardsave._storage.find import cannot_read, open_checkpoint_file, refuse_other_kind
from shardsave._storage.mapping import map_file
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError

_MAX_ORDER_BYTES = 16

#: The largest pickle in a compressed record. torch compresses nothing, and a few kilobytes can become a pickle of 512 MB.
_MAX_PACKED_BYTES = 64_000_000

#: What torch's old format begins with: this number and this version.
_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001

#: What `zipfile` raises for archives that it cannot read.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    NotImplementedError,
    OverflowError,
    EOFError,
    RuntimeError,
)


class TorchFile(NamedTuple):
    """What a file holds. ``content`` is any nesting of dicts and lists; its plain tensors are views of ``mappings``."""

    content: Any
    mappings: tuple[mmap.mmap, ...]
    notes: tuple[str, ...]


class Window(io.RawIOBase):
    """A byte range of an open file, as a seekable file object."""

    def __init__(self, fd: int, begin: int, length: int) -> None:
        self._fd, self._begin, self._length, self._position = fd, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = read_at(self._fd, min(len(view), max(0, self._length - self._position)), self._begin + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


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
            archive = _Archive(file.fd, mapping, 0, length, path)
            content, notes = archive.content(Names(allowed)), archive.notes()
        else:
            content, notes = _read_old_format(file.fd, mapping, length, Names(allowed), path), ()
    return TorchFile(content, (mapping,), notes)


class Archives:
    """The files of a distributed checkpoint: each holds many small archives of ``torch.save``, each with one tensor or other value."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._open: dict[str, tuple[Descriptor, mmap.mmap, int]] = {}

    def tensor(self, name: str, offset: int, length: int) -> torch.Tensor:
        """The tensor of the archive that begins ``offset`` bytes into the file ``name`` and has ``length`` bytes."""
        tensor = self._archive(name, offset, length).content(Names())
        if not isinstance(tensor, torch.Tensor):
            refuse_damaged(
                os.path.join(self._folder, name), f"a tensor was expected at {offset}, there is a {type(tensor).__name__}"
            )
        return tensor

    def value(self, name: str, offset: int, length: int) -> Any:
        """What such an archive holds, whatever its pickle asks for: the objects of unknown classes are records that do nothing."""
        return self._archive(name, offset, length).content(Names(every=True))

    def _archive(self, name: str, offset: int, length: int) -> _Archive:
        path = os.path.join(self._folder, name)
        if name not in self._open:
            self._open[name] = self._map(path, name)
        file, mapping, end = self._open[name]
        if not 0 <= offset <= offset + length <= end:
            refuse_damaged(path, f"a tensor was expected at {offset}, {length} bytes long, the file has {end}")
        return _Archive(file.fd, mapping, offset, length, path)

    @staticmethod
    def _map(path: str, name: str) -> tuple[Descriptor, mmap.mmap, int]:
        file = open_checkpoint_file(path, name)
        if file is None:
            raise CorruptCheckpointError(
                f"corrupt checkpoint: {path}: the file was expected, it is not there; nothing was written"
            )
        length = call(os.fstat, path, file.fd).st_size
        if not length:
            refuse_damaged(path, "it is empty")
        return file, map_file(file.fd, path), length

    def close(self) -> tuple[mmap.mmap, ...]:
        """Closes the files and returns the mappings that the tensors are views of."""
        for file, _, _ in self._open.values():
            file.abandon()
        return tuple(mapping for _, mapping, _ in self._open.values())


class _Archive:
    """The zip archive of a ``torch.save``, which begins at ``begin`` in a mapped file: one pickle, and a record for each storage."""

    def __init__(self, fd: int, mapping: mmap.mmap, begin: int, length: int, path: str) -> None:
        self._mapping, self._begin, self._end, self._path = mapping, begin, begin + length, path
        self._copied = False
        try:
            self._zip = zipfile.ZipFile(io.BufferedReader(Window(fd, begin, length)))
            names = self._zip.namelist()
            refuse_program(path, names)
            pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
            if not pickles:
                kind = "of NumPy arrays " if names and all(name.endswith(".npy") for name in names) else ""
                raise IncompatibleCheckpointError(
                    f"cannot convert {path}: a file of torch.save was expected, it is a zip archive {kind}that torch did not write, with "
                    f"{some(names) or 'nothing in it'}; nothing was written"
                )
            if len(pickles) > 1 or len(set(names)) != len(names):
                refuse_damaged(path, "it is a zip archive with other files than torch writes")
            self._root = pickles[0].removesuffix("data.pkl")
            order = f"{self._root}byteorder"
            self._swapped = order in names and self._read(order, _MAX_ORDER_BYTES) != sys.byteorder.encode()
        except CallFailed as error:
            raise cannot_read(path, error) from error
        except _ZIP_ERRORS as error:
            refuse_damaged(path, f"it is no archive that can be read ({error})")

    def content(self, names: Names) -> Any:
        """The content of the pickle, with tensors in place of their descriptions. Raises UntrustedCodeError."""
        try:
            name = f"{self._root}data.pkl"
            entry = self._entry(name)
            is_packed = entry.compress_type != zipfile.ZIP_STORED
            if entry.file_size > MAX_PICKLE_BYTES:
                refuse_long_pickle(self._path, entry.file_size, MAX_PICKLE_BYTES)
            data = self._read(name, _MAX_PACKED_BYTES if is_packed else MAX_PICKLE_BYTES)
            content = _unpickle(io.BytesIO(data), names, self._path, storage_of)
            return Placing(self._storage, self._path).place(content)
        except CallFailed as error:
            raise cannot_read(self._path, error) from error
        except RecursionError:
            refuse_damaged(self._path, "it holds containers nested too deeply, or in themselves")
        except _ZIP_ERRORS as error:
            refuse_damaged(self._path, f"it is no archive that can be read ({error})")

    def notes(self) -> tuple[str, ...]:
        if not self._copied:
            return ()
        return (
            f"{os.path.basename(self._path)} is not as torch wrote it, so it cannot be mapped: all of it was read into memory",
        )

    def _storage(self, storage: Storage) -> torch.Tensor:
        """The bytes of a storage: a view of the mapping, or a copy if the record is compressed or has the other byte order."""
        entry = self._entry(f"{self._root}data/{storage.key}")
        if entry.file_size != storage.nbytes:
            refuse_damaged(self._path, f"{storage.nbytes} bytes of {entry.filename} were expected, it has {entry.file_size}")
        if entry.compress_type == zipfile.ZIP_STORED and not self._swapped:
            return torch.frombuffer(self._mapping, dtype=torch.uint8, count=storage.nbytes, offset=self._offset(entry))
        self._copied = True
        data = bytearray(self._read(entry.filename, storage.nbytes))
        if self._swapped:
            part = storage.dtype.itemsize // (2 if storage.dtype.is_complex else 1)
            data = bytearray(np.frombuffer(data, f"u{part}").byteswap().tobytes())
        return torch.frombuffer(data, dtype=torch.uint8)

    def _entry(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(name)
        except KeyError:
            refuse_damaged(self._path, f"the record {name} was expected, it is not there")

    def _read(self, name: str, limit: int) -> bytes:
        """A record of at most ``limit`` bytes. Only compressed records have checksums that are compared: torch need not write them."""
        entry = self._entry(name)
        if entry.file_size > limit:
            refuse_damaged(self._path, f"at most {limit} bytes of {name} were expected, it has {entry.file_size}")
        if entry.compress_type != zipfile.ZIP_STORED:
            return self._zip.read(entry)
        begin = self._offset(entry)
        return self._mapping[begin : begin + entry.file_size]

    def _offset(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of a stored record begin in the file."""
        # The local header has its own lengths of the name and of the extra field after it.
        header = self._begin + entry.header_offset
        name_length, extra_length = struct.unpack("<HH", self._mapping[header + 26 : header + 30])
        begin: int = header + 30 + name_length + extra_length
        if entry.flag_bits & 1 or begin + entry.file_size > self._end:
            refuse_damaged(
                self._path, f"the record {entry.filename} was expected in the file, it ends beyond it or is encrypted"
            )
        return begin


def _read_old_format(fd: int, mapping: mmap.mmap, length: int, names: Names, path: str) -> Any:
    """The content of a file as torch wrote it before version 1.6: a few pickles, then the bytes of all storages."""
    file = io.BufferedReader(Window(fd, 0, length))
    storages: dict[str, Storage] = {}

    def remembered(saved_id: Any) -> Storage:
        storage = storage_of(saved_id)
        return storages.setdefault(storage.key, storage)._replace(begin=storage.begin)

    _unpickle(file, names, path, first=True)
    if _unpickle(file, names, path) != _OLD_VERSION:
        refuse_damaged(path, "it is a pickle that torch.save did not write")
    # Sizes of C types on the machine that wrote it; torch writes the data as if these were the usual ones.
    _unpickle(file, names, path)
    content = _unpickle(file, names, path, remembered)
    keys = _unpickle(file, names, path)
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


def _unpickle(
    file: Any, names: Names, path: str, find_storage: Callable[[Any], Storage] | None = None, *, first: bool = False
) -> Any:
    """Reads one pickle. Raises CorruptCheckpointError, or UntrustedCodeError if it has names that are not allowed.

    ``first``: whether it is the first one of a file without an archive; then it must be the number of torch's old format.
    """
    content, broken = None, ""
    try:
        content = Unpickler(file, names.find, find_storage).load()
    except CallFailed as error:
        raise cannot_read(path, error) from error
    except Exception as error:  # unpickling damaged data may raise anything
        broken = f"{type(error).__name__}: {error}" if isinstance(error, Forbidden) else type(error).__name__
    is_magic = type(content) is int and content == _MAGIC
    if first and not is_magic and (not broken or names.has_plain_storages()):
        refuse_plain_pickle(path)
    if names.unknown:
        refuse_names(path, names.unknown, content)
    if broken:
        refuse_damaged(path, f"it is no file of torch.save: its pickle is broken ({broken})")
    return content
