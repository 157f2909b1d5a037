"""Reads one pickle of a file of ``torch.save``; whatever is wrong with it becomes the error that names it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

from shardsave._common.os_calls import CallFailed, read_at
from shardsave._foreign.pickle_refusals import refuse_damaged, refuse_names, refuse_plain_pickle
from shardsave._foreign.pickled_tensors import Names, Storage
from shardsave._foreign.records import Forbidden
from shardsave._foreign.unpickling import Unpickler
from shardsave._storage.find import cannot_read

#: The first pickle of a file in torch's old format.
_MAGIC = 0x1950A86A20F9469CFC6C


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


def read_pickle(
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
