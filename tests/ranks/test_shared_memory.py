"""The memory of windows: there as a whole before anything is written to it, the same for all who map it, gone when it is closed."""

from __future__ import annotations

import mmap
import os
import platform
from pathlib import Path

import pytest

from shardsave._common.descriptors import Descriptor
from shardsave._ranks import windows
from shardsave._ranks.windows import SharedMemory

HUGE = 2 << 20
NBYTES = 8 << 20


def mapping_at(address: int) -> dict[str, int]:
    """What the kernel says about the memory that is mapped at ``address``: field → bytes, and the name of its file; empty if nothing is."""
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(number, 16) for number in words[0].split("-"))
            if begin <= address < end:
                fields = {"size": end - begin} | ({words[5]: 1} if len(words) > 5 else {})
            elif fields:
                return fields
        elif fields and words[-1] == "kB":
            fields[words[0].rstrip(":")] = int(words[1]) << 10
    return fields


def gives_huge_pages() -> bool:
    """Whether this kernel has a huge page now, and can make one of shared memory too."""
    if tuple(int(part) for part in platform.release().split(".")[:2]) < (6, 1):
        return False
    memory = mmap.mmap(-1, 4 * HUGE, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
    return any("AnonHugePages" in line and " 0 kB" not in line for line in Path("/proc/self/smaps").read_text().splitlines())


@pytest.fixture(params=["huge pages", "ordinary pages"], autouse=True)
def pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test also runs as on a kernel that does not know how to make huge pages, and refuses the advice."""
    if request.param == "ordinary pages":
        monkeypatch.setattr(windows, "_MADV_COLLAPSE", 0x7FFF)


def test_all_of_it_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that is taken page by page while it is mapped or written, when a lack of it kills the process."""
    monkeypatch.setattr(mmap, "MAP_POPULATE", 0)
    made = SharedMemory.new(NBYTES)
    assert os.fstat(made.file.fd).st_blocks * 512 == NBYTES
    fields = mapping_at(made.address)
    assert fields["size"] == NBYTES
    assert "/memfd:shardsave" in fields
    assert bytes(made.view) == bytes(NBYTES)
    made.close()


def test_it_is_one_memory_for_all_who_map_it() -> None:
    made = SharedMemory.new(NBYTES)
    other = SharedMemory(Descriptor.of(os.dup(made.file.fd)), NBYTES, populate=False)
    made.view[:3], other.view[-3:] = b"one", b"two"
    assert (bytes(other.view[:3]), bytes(made.view[-3:])) == (b"one", b"two")
    made.close()
    assert bytes(other.view[:3]) == b"one"
    other.close()


def test_nothing_of_it_stays() -> None:
    """Also while somebody has a view of it, which must not become one of other memory."""
    made = SharedMemory.new(NBYTES)
    address, fd, view = made.address, made.file.fd, made.view[:2]
    view[:] = b"in"
    made.close()
    assert bytes(view) == b"in"
    view.release()
    del made, view
    assert "/memfd:shardsave" not in mapping_at(address)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_it_has_huge_pages(request: pytest.FixtureRequest) -> None:
    """Catches memory that a disk takes in many short requests, which costs a third of its speed."""
    wanted = NBYTES if "huge pages" in request.node.name else 0
    if not gives_huge_pages():
        pytest.skip("this kernel gives no huge pages")
    memory = SharedMemory.new(NBYTES)
    other = SharedMemory(Descriptor.of(os.dup(memory.file.fd)), NBYTES, populate=True)
    assert mapping_at(memory.address)["ShmemPmdMapped"] == wanted
    assert mapping_at(other.address)["ShmemPmdMapped"] == wanted
    memory.close()
    other.close()
