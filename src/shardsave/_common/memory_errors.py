"""Errors for a lack of memory: before a load that cannot fit, and for tensors that no memory could be allocated for.

torch raises several errors, none of which names the tensor. Linux promises more memory than there is, and ends a process that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardsave._common.free_memory import free_memory, return_freed_memory
from shardsave._common.words import human_bytes
from shardsave.errors import OutOfMemoryError

_LACK_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)

#: Less memory is allocated without asking how much is free; a process with torch needs several times that.
_SMALL = 64 << 20


def check_free_memory(where: str, nbytes: int, state: str) -> tuple[str, ...]:
    """Refuses to allocate ``nbytes`` of memory on the CPU if they surely do not fit, even with swap space; a load would be killed later.

    What is free is an estimate, so a load that would only swap goes on, and a note is returned for the report. ``where``: the path of
    the checkpoint; ``state``: the state of things, for the message. Raises OutOfMemoryError.
    """
    if nbytes < _SMALL:
        return ()
    free = free_memory()
    if free is not None and nbytes > free.bytes:
        return_freed_memory()  # it takes time, and is seldom needed
        free = free_memory()
    if free is None or nbytes <= free.bytes:
        return ()
    if nbytes > free.with_swap:
        swap = f" (with swap, {human_bytes(free.with_swap)})" if free.with_swap > free.bytes else ""
        raise OutOfMemoryError(
            f"cannot load {where}: {human_bytes(nbytes)} of memory on the CPU were expected, {free.of} has {human_bytes(free.bytes)} "
            f"free{swap}; load less at a time, map the files (mmap=True, or open), or load to a device; {state}"
        )
    return (
        f"{human_bytes(nbytes)} of memory were needed, {free.of} had {human_bytes(free.bytes)} free: a part may be swapped",
    )


@contextmanager
def memory_for(name: str, nbytes: int, device: torch.device | None) -> Iterator[None]:
    """Raises OutOfMemoryError if torch cannot allocate memory in the block, which needs ``nbytes`` for the tensor ``name``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        refuse_lack_of_memory(error, name, nbytes, device)
        raise


def refuse_lack_of_memory(error: Exception, name: str, nbytes: int, device: torch.device | None) -> None:
    """Raises OutOfMemoryError if ``error`` says that memory could not be allocated."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _LACK_OF_MEMORY.search(str(error)):
        where = f"on the device {device}" if device is not None else "on the module's device"
        raise OutOfMemoryError(
            f"cannot load {name!r}: {human_bytes(nbytes)} of memory {where} were expected, torch could not allocate them; "
            f"the files on disk are as they were"
        ) from error
