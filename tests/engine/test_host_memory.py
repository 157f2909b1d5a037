"""`engine.HostMemory`: its address and lifetime, forked children, and too little of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from shardsave._engine import engine
from shardsave._engine.transfer import TransferFault
from support import holds_in_child

NBYTES = (32 << 20) + 5


def address_of(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = ([int(bound, 16) for bound in line.split()[0].split("-")] for line in lines)
    return any(begin <= address < end for begin, end in ranges)


def test_the_memory_is_freed_with_its_last_view(engine_name: str) -> None:
    """Catches memory that is not page aligned, too short, lost while somebody still has a view of it, or kept afterwards."""
    memory = engine.HostMemory(NBYTES)
    address = address_of(memory.view)
    assert address % mmap.PAGESIZE == 0 and len(memory.view) == memory.nbytes == NBYTES and memory.view.format == "B"
    assert (memory.pinned, memory.note) == (False, "")
    memory.view[-1] = 7
    tail = np.frombuffer(memory.view[-5:], np.uint8)
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="this memory was closed"):
        _ = memory.view
    assert tail.tolist() == [0, 0, 0, 0, 7] and is_mapped(address)
    del tail
    assert not is_mapped(address)


def test_no_bytes_at_all(engine_name: str) -> None:
    """Catches an error for a snapshot of empty tensors."""
    memory = engine.HostMemory(0)
    assert len(memory.view) == memory.nbytes == 0
    memory.close()


def test_a_forked_child_leaves_it_alone(engine_name: str) -> None:
    """Catches a child that unmaps what it has mapped itself where its parent has the memory; and one that is killed when it looks there."""
    memory = engine.HostMemory(NBYTES)
    memory.view[:3] = b"abc"
    address = address_of(memory.view)
    map_fixed_noreplace = 0x100000
    map_memory = ctypes.CDLL(None, use_errno=True).mmap
    map_memory.restype = ctypes.c_void_p
    map_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_fixed_noreplace

    def check() -> bool:
        with pytest.raises(ValueError, match="belongs to the process that forked this one"):
            _ = memory.view
        if engine_name == "portable":
            return True  # the child has a copy, which it may free
        assert map_memory(address, NBYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address
        memory.close()
        ctypes.memset(address, 1, NBYTES)
        return True

    assert holds_in_child(check)
    assert bytes(memory.view[:3]) == b"abc"
    memory.close()


def test_too_little_memory(engine_name: str) -> None:
    """Catches another error than the one for staging memory."""
    with pytest.raises(TransferFault) as caught:
        engine.HostMemory(1 << 60)
    fault = caught.value
    assert (fault.file, fault.errno, fault.length) == (-1, errno.ENOMEM, 1 << 60)
    assert str(fault) == f"mmap of memory for a snapshot: {os.strerror(errno.ENOMEM)}"


def test_memory_that_cannot_be_pinned(engine_name: str) -> None:
    """Catches a failed pinning that fails the allocation, or about which nothing is said."""
    memory = engine.HostMemory(NBYTES, device=999)
    assert not memory.pinned and memory.note.startswith("memory for a snapshot could not be pinned (")
    memory.view[:] = bytes(NBYTES)
    memory.close()
