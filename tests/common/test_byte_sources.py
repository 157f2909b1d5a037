"""Sources: any range of bytes of any kind of tensor, gathered and scattered, is what a plain copy would have there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from shardsave._common.assembled import Assembled, Chunk
from shardsave._common.boxes import boxes
from shardsave._common.sources import ByteSource, TensorSource
from support import same_bits


def file_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """The bytes that a file has for ``tensor``, computed with torch alone."""
    plain = tensor.resolve_conj().resolve_neg().contiguous().to(dtype)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def cut(tensor: torch.Tensor) -> list[Chunk]:
    """Four parts of a tensor of three dimensions, which begin and end at different places."""
    boxes = [(0, 2, 0, 3), (0, 2, 3, 6), (2, 5, 0, 1), (2, 5, 1, 6)]
    return [Chunk((top, left, 0), tensor[top:bottom, left:right].clone()) for top, bottom, left, right in boxes]


def whole_of(source: ByteSource) -> torch.Tensor:
    """The elements of ``source``."""
    if isinstance(source, TensorSource):
        return source.tensor
    assert isinstance(source, Assembled)
    whole = torch.empty(source.shape, dtype=source.chunks[0].tensor.dtype)
    for begin, tensor in source.chunks:
        whole[tuple(slice(first, first + size) for first, size in zip(begin, tensor.shape))] = tensor
    return whole


FLOATS = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))

SOURCES: dict[str, ByteSource] = {
    "plain": TensorSource.of(FLOATS),
    "transposed": TensorSource.of(FLOATS.permute(2, 0, 1)),
    "every second": TensorSource.of(FLOATS[::2, :, ::3]),
    "float8": TensorSource.of(FLOATS.to(torch.float8_e4m3fn)[:, 1:]),
    "scalar": TensorSource.of(torch.tensor(2.5)),
    "conjugate": TensorSource.of(torch.complex(FLOATS, FLOATS + 1).conj()),
    "negative": TensorSource.of(torch.complex(FLOATS, FLOATS + 1).conj().imag),
    "cast": TensorSource(FLOATS, torch.bfloat16),
    "cast of a view": TensorSource(FLOATS.permute(1, 2, 0), torch.float64),
    "assembled": Assembled(torch.float32, FLOATS.shape, cut(FLOATS)),
    "assembled and cast": Assembled(torch.float16, FLOATS.shape, cut(FLOATS)),
}


def ranges(source: ByteSource, count: int = 60) -> list[tuple[int, int]]:
    """Random ranges of whole elements, an empty one and the whole among them."""
    draw, item = random.Random(1), source.dtype.itemsize
    elements = source.nbytes // item
    pairs = [sorted(item * draw.randrange(elements + 1) for _ in range(2)) for _ in range(count)]
    return [(0, 0), (0, source.nbytes), *((begin, end) for begin, end in pairs)]


@pytest.mark.parametrize("name", SOURCES)
def test_any_range_is_gathered(name: str) -> None:
    """Catches an element from the wrong place where a block begins or ends in the middle of a row."""
    source = SOURCES[name]
    wanted = file_bytes(whole_of(source), source.dtype)
    assert source.nbytes == len(wanted)
    for begin, end in ranges(source):
        view = bytearray(end - begin)
        source.gather(begin, memoryview(view))
        assert view == wanted[begin:end], (begin, end)


@pytest.mark.parametrize("name", SOURCES)
def test_any_range_is_scattered(name: str) -> None:
    """Catches bytes that go to the wrong element, or to elements outside of the range."""
    source = SOURCES[name]
    elements = [source.tensor] if isinstance(source, TensorSource) else [chunk.tensor for chunk in source.chunks]  # type: ignore[attr-defined]
    before = [tensor.clone() for tensor in elements]
    values = bytearray(file_bytes(torch.arange(source.nbytes // source.dtype.itemsize) % 50, source.dtype))
    try:
        for begin, end in ranges(source, 20):
            wanted = bytearray(file_bytes(whole_of(source), source.dtype))
            wanted[begin:end] = values[begin:end]
            source.scatter(begin, memoryview(values)[begin:end])
            assert file_bytes(whole_of(source), source.dtype) == wanted, (begin, end)
    finally:
        for tensor, old in zip(elements, before):
            tensor.copy_(old)
    assert all(same_bits(tensor, old) for tensor, old in zip(elements, before))


def test_only_the_very_bytes_count_as_memory() -> None:
    """Catches an address whose bytes are not those of the file, and a copy of every plain tensor."""
    with_memory = {name for name, source in SOURCES.items() if source.memory() is not None}
    assert with_memory == {"plain", "scalar"}
    assert SOURCES["plain"].memory() == (-1, FLOATS.data_ptr())


def test_the_extension_counts_devices_likewise() -> None:
    """Catches an address that the extension takes for one of lent or of device memory."""
    native = pytest.importorskip("shardsave._native")
    assert native.HOST == -1 and native.LENT < 0 and native.DISCARD < 0


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1, 4), (2, 3, 4, 5), (0, 3), (3, 0)])
def test_boxes_cover_a_range_once(shape: Sequence[int]) -> None:
    """Catches elements that no box has, or two have, boxes out of order, and more boxes than are needed."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            covering = list(boxes(shape, start, stop))
            covered = [int(n) for box in covering for n in numbers[box].reshape(-1)]
            assert covered == list(range(start, stop)), (start, stop)
            assert len(covering) <= max(1, 2 * len(shape) - 1)


def test_a_cut_element_is_refused() -> None:
    """Catches a range that begins or ends within an element, which would be copied from the wrong place."""
    for begin, length in ((2, 4), (4, 6)):
        with pytest.raises(ValueError, match=f"range of {length} bytes at {begin} cuts an element of 4 bytes"):
            SOURCES["plain"].gather(begin, memoryview(bytearray(length)))


def test_bytes_read_from_parts_are_counted() -> None:
    """Catches a conversion that cannot tell how much of a mapped file it has read."""
    counts: list[int] = []
    source = Assembled(torch.float16, FLOATS.shape, cut(FLOATS), counts.append)
    source.gather(0, memoryview(bytearray(source.nbytes)))
    assert sum(counts) == FLOATS.nbytes and len(counts) == 4
