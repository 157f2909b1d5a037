"""The error for tensors that no memory could be allocated for; torch raises several, none of which names the tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardsave._common.words import human_bytes
from shardsave.errors import ShardSaveError

_LACK_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def memory_for(name: str, nbytes: int, device: torch.device | None) -> Iterator[None]:
    """Raises ShardSaveError if torch cannot allocate memory in the block, which needs ``nbytes`` for the tensor ``name``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        refuse_lack_of_memory(error, name, nbytes, device)
        raise


def refuse_lack_of_memory(error: Exception, name: str, nbytes: int, device: torch.device | None) -> None:
    """Raises ShardSaveError if ``error`` says that memory could not be allocated."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _LACK_OF_MEMORY.search(str(error)):
        where = f"on the device {device}" if device is not None else "on the module's device"
        raise ShardSaveError(
            f"cannot load {name!r}: {human_bytes(nbytes)} of memory {where} were expected, torch could not allocate them; "
            f"the files on disk are as they were"
        ) from error
