"""A file mapped into memory. No torch here: the caller decides what the bytes become."""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Iterable

from shardsave._common.os_calls import CallFailed, call
from shardsave._storage.find import cannot_read

#: A private mapping that may be written counts against memory and swap unless it asks for no reservation (mmap(2)): without this
#: flag, a file larger than both cannot be mapped. Python has the name from 3.13 on; the number is from asm-generic/mman.h.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)


def map_file(descriptor: int, path: str) -> mmap.mmap:
    """Maps the file behind ``descriptor``; writes to the mapping stay in this process. Raises ValueError if the file is empty."""
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        # With length 0 Python would call fstat itself, and would treat a failure of that like an empty file.
        length = call(os.fstat, path, descriptor).st_size
        if length == 0:
            raise ValueError(f"{path!r} is empty")
        return call(mmap.mmap, path, descriptor, length, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=writable)
    except CallFailed as error:
        raise cannot_read(path, error) from error


def let_go(mappings: Iterable[mmap.mmap]) -> None:
    """Frees the memory of mapped pages; the next access reads them from the file again. The pages must not have been written to."""
    for mapping in mappings:
        mapping.madvise(mmap.MADV_DONTNEED)
