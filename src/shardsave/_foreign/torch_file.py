"""Reads files of ``torch.save``. Only torch's own restricted unpickler reads their pickle, so no code in a file is run.

The pickle is read with tensors on the meta device, so no data is read. Then the file is mapped, and each tensor becomes a view of
its bytes in the mapping.
"""

from __future__ import annotations

import functools
import io
import mmap
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from shardsave._common.memory import PLAIN_TYPES
from shardsave._common.os_calls import CallFailed, Descriptor, call, read_at
from shardsave._storage.find import cannot_read, open_checkpoint_file
from shardsave._storage.mapping import map_file
from shardsave.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError, UntrustedCodeError

_ZIP = b"PK\x03\x04"
#: The beginnings of those lines of a torch message that only give advice.
_ADVICE = ("Weights only load failed", "Please file an issue", "Check the documentation")
#: The name that a torch message is about. Any text can be in a name, so its end is where the message repeats it, or the message ends.
_GLOBAL = re.compile(r"GLOBAL (.+)(?: was not an allowed global by default\..*?\[\1\]| whose module \w+ is blocked)", re.DOTALL)


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


def read_torch_file(path: str) -> TorchFile:
    """Reads what ``torch.save`` wrote to ``path``. Raises CheckpointNotFoundError, CorruptCheckpointError, UntrustedCodeError."""
    file = open_checkpoint_file(path, os.path.basename(path))
    if file is None:
        raise CheckpointNotFoundError(f"no checkpoint at {path}: No such file or directory")
    with file:
        try:
            length = call(os.fstat, path, file.fd).st_size
            start = read_at(file.fd, 4, 0)
        except CallFailed as error:
            raise cannot_read(path, error) from error
        if not length:
            _bad(path, "it is empty")
        window = Window(file.fd, 0, length)
        if start != _ZIP:
            # The format of torch before version 1.6: one stream, in which tensors have no fixed place to map.
            note = f"{os.path.basename(path)} has torch's old format, which cannot be mapped: all of it was read into memory"
            return TorchFile(unpickle(window, path, "cpu"), (), (note,))
        mapping = map_file(file.fd, path)
        try:
            return TorchFile(_read_mapped(file.fd, mapping, 0, length, path), (mapping,), ())
        except _NotMappable as reason:
            note = f"{os.path.basename(path)} {reason}, so it cannot be mapped: all of it was read into memory"
        return TorchFile(unpickle(window, path, "cpu"), (), (note,))


class Archives:
    """The files of a distributed checkpoint: each holds many small archives of ``torch.save``, with one tensor per archive."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._open: dict[str, tuple[Descriptor, mmap.mmap, int]] = {}

    def tensor(self, name: str, offset: int, length: int) -> torch.Tensor:
        """The tensor of the archive that begins ``offset`` bytes into the file ``name`` and has ``length`` bytes."""
        path = os.path.join(self._folder, name)
        if name not in self._open:
            self._open[name] = self._map(path, name)
        file, mapping, end = self._open[name]
        if not 0 <= offset <= offset + length <= end:
            _bad(path, f"a tensor was expected at {offset}, {length} bytes long, the file has {end}")
        try:
            tensor = _read_mapped(file.fd, mapping, offset, length, path)
        except _NotMappable:
            tensor = unpickle(Window(file.fd, offset, length), path, "cpu")
        if not isinstance(tensor, torch.Tensor):
            _bad(path, f"a tensor was expected at {offset}, there is a {type(tensor).__name__}")
        return tensor

    @staticmethod
    def _map(path: str, name: str) -> tuple[Descriptor, mmap.mmap, int]:
        file = open_checkpoint_file(path, name)
        if file is None:
            raise CorruptCheckpointError(
                f"corrupt checkpoint: {path}: the file was expected, it is not there; nothing was written"
            )
        length = call(os.fstat, path, file.fd).st_size
        if not length:
            _bad(path, "it is empty")
        return file, map_file(file.fd, path), length

    def close(self) -> tuple[mmap.mmap, ...]:
        """Closes the files and returns the mappings that the tensors are views of."""
        for file, _, _ in self._open.values():
            file.abandon()
        return tuple(mapping for _, mapping, _ in self._open.values())


def unpickle(file: io.RawIOBase, path: str, location: str) -> Any:
    """``torch.load(weights_only=True)``, with each refusal as one of our errors, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TypedStorage, which old files name
            return torch.load(io.BufferedReader(file), map_location=location, weights_only=True)
    except CallFailed as error:
        raise cannot_read(path, error) from error
    except pickle.UnpicklingError as error:
        if (name := _GLOBAL.search(str(error))) is not None:
            raise UntrustedCodeError(
                f"cannot convert {path}: tensors, numbers, strings and containers of these were expected, its pickle asks for "
                f"{name[1]}; nothing of it was run, nothing was written"
            ) from None
        _bad(path, f"it is no file of torch.save ({_reason(error)})")
    except Exception as error:  # torch may raise anything when it reads bytes that it did not write
        if location == "meta" and "Quantized" in str(error):
            # The meta device has no quantised tensors. Once read on the CPU, they are refused by name.
            raise _NotMappable("holds quantised tensors") from None
        _bad(path, f"it is no file of torch.save ({_reason(error)})")


def _reason(error: Exception) -> str:
    """The sentence of a torch message that describes the problem, without the advice around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(_ADVICE)]
    return reasons[0].split(". ")[0][:160].rstrip(".") if reasons else type(error).__name__


class _NotMappable(Exception):
    """The bytes of a tensor are not where torch writes them, or their offset is unknown. The file can still be read into memory."""

    def __init__(self, reason: str = "is not as torch wrote it") -> None:
        super().__init__(reason)


@functools.cache
def _torch_reports_offsets() -> bool:
    """Whether this version of torch reports the file offset of a tensor on the meta device; versions before 2.11 do not."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    storage = torch.load(file, map_location="meta", weights_only=True).untyped_storage()
    return getattr(storage, "_checkpoint_offset", None) is not None


def _read_mapped(fd: int, mapping: mmap.mmap, begin: int, length: int, path: str) -> Any:
    """The content of the archive at ``begin``, ``length`` bytes long, with mapped tensors. Raises _NotMappable."""
    records = _records(fd, begin, length, path)
    if not _torch_reports_offsets():
        raise _NotMappable(f"is read by torch {torch.__version__}, which does not report the offsets of tensors")
    try:
        return _Placing(mapping, begin, records, path).place(unpickle(Window(fd, begin, length), path, "meta"))
    except RecursionError:
        _bad(path, "it holds containers nested too deeply, or in themselves")


def _records(fd: int, begin: int, length: int, path: str) -> dict[int, int]:
    """Offset → length of each record of the archive, in bytes. Raises _NotMappable if a record is compressed or byte-swapped."""
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(fd, begin, length))) as archive:
            records = {}
            _refuse_program(path, archive.namelist())
            for entry in archive.infolist():
                byte_swapped = entry.filename.endswith("/byteorder") and archive.read(entry).decode() != sys.byteorder
                if entry.compress_type != zipfile.ZIP_STORED or byte_swapped:
                    raise _NotMappable
                # The local header has its own lengths of the name and of the extra field after it.
                lengths = read_at(fd, 4, begin + entry.header_offset + 26)
                records[entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))] = entry.file_size
    except CallFailed as error:
        raise cannot_read(path, error) from error
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError, EOFError) as error:
        _bad(path, f"it is no archive that can be read ({error})")
    return records


def _refuse_program(path: str, records: Sequence[str]) -> None:
    """Refuses archives that hold a program beside the weights; the message names their kind."""
    inner = {name.partition("/")[2] for name in records}
    if "constants.pkl" in inner:
        kind, advice = "a TorchScript archive", "load it with torch.jit.load and save its state_dict()"
    elif {"archive_format", "archive_version"} <= inner or "serialized_exported_program.json" in {*inner, *records}:
        kind, advice = "a program of torch.export", "load it with torch.export.load and save its state_dict"
    else:
        return
    raise IncompatibleCheckpointError(
        f"cannot convert {path}: a file of torch.save was expected, it is {kind}; {advice}; nothing was written"
    )


class _Placing:
    """Replaces each plain meta tensor of a content by a view of its bytes; the archive begins at ``begin`` in the file.

    torch computes the offset at which it would write a tensor. The offset is used only if a record of the right length begins there.
    """

    def __init__(self, mapping: mmap.mmap, begin: int, records: Mapping[int, int], path: str) -> None:
        self._mapping, self._begin, self._records, self._path = mapping, begin, records, path
        self._placed: dict[int, Any] = {}  # by the identity of a container, which may be in many others

    def place(self, content: Any) -> Any:
        """``content`` with tensors that are mapped. The content has to stay alive meanwhile."""
        if id(content) in self._placed:
            return self._placed[id(content)]
        if isinstance(content, Mapping):
            placed: Any = {key: self.place(value) for key, value in content.items()}
        elif isinstance(content, (list, tuple, set, frozenset)):
            placed = [self.place(value) for value in content]
        else:
            return self._tensor(content)
        self._placed[id(content)] = placed
        return placed

    def _tensor(self, content: Any) -> Any:
        if type(content) not in PLAIN_TYPES or content.layout is not torch.strided or content.is_quantized or content.is_nested:
            return content
        storage = content.untyped_storage()
        if storage.nbytes() == 0 or content.numel() == 0:
            return torch.empty(content.shape, dtype=content.dtype)
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None:
            return content  # the tensor was on the meta device when it was saved
        if self._records.get(offset) != storage.nbytes():
            raise _NotMappable
        offset += self._begin
        needed = (
            content.storage_offset() + sum((size - 1) * stride for size, stride in zip(content.shape, content.stride())) + 1
        )
        if min(*content.stride(), content.storage_offset(), 0) < 0 or needed * content.element_size() > storage.nbytes():
            _bad(self._path, f"a tensor of {tuple(content.shape)} does not lie in its {storage.nbytes()} bytes")
        raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=storage.nbytes(), offset=offset)
        tensor = torch.empty(0, dtype=content.dtype)
        try:
            tensor.set_(raw.untyped_storage(), content.storage_offset(), content.shape, content.stride())
        except RuntimeError as error:
            _bad(
                self._path,
                f"a tensor of {tuple(content.shape)} does not lie in its {storage.nbytes()} bytes ({_reason(error)})",
            )
        tensor = tensor.conj() if content.is_conj() else tensor
        return torch._neg_view(tensor) if content.is_neg() else tensor


def _bad(path: str, found: str) -> NoReturn:
    raise CorruptCheckpointError(
        f"corrupt {os.path.basename(path)}: {path}: a file of torch.save was expected, {found}; nothing was written"
    ) from None  # torch's own messages have names from the file as they are
