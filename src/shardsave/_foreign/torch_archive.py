"""The zip archive of a ``torch.save``: one pickle, and a record with the bytes of each storage, which tensors are views of."""

from __future__ import annotations

import io
import mmap
import os
import struct
import sys
import zipfile
import zlib
from typing import Any

import numpy as np
import torch

from shardsave._common.descriptors import Descriptor
from shardsave._common.os_calls import CallFailed, call
from shardsave._common.words import some
from shardsave._foreign.pickle_refusals import refuse_damaged, refuse_long_pickle, refuse_program
from shardsave._foreign.pickled_tensors import Names, Storage, storage_of
from shardsave._foreign.placing import Placing
from shardsave._foreign.torch_pickle import Window, read_pickle
from shardsave._foreign.unpickling import MAX_PICKLE_BYTES
from shardsave._storage.find import cannot_read, open_checkpoint_file
from shardsave._storage.mapping import map_file
from shardsave.errors import CorruptCheckpointError, IncompatibleCheckpointError

_MAX_ORDER_BYTES = 16

#: The largest pickle in a compressed record. torch compresses nothing, and a few kilobytes can become a pickle of 512 MB.
_MAX_PACKED_BYTES = 64_000_000

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


class Archive:
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
            content = read_pickle(io.BytesIO(data), names, self._path, storage_of)
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

    def _archive(self, name: str, offset: int, length: int) -> Archive:
        path = os.path.join(self._folder, name)
        if name not in self._open:
            self._open[name] = self._map(path, name)
        file, mapping, end = self._open[name]
        if not 0 <= offset <= offset + length <= end:
            refuse_damaged(path, f"a tensor was expected at {offset}, {length} bytes long, the file has {end}")
        return Archive(file.fd, mapping, offset, length, path)

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
