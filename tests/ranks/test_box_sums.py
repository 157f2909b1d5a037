"""What boxes add to the checksum of their tensor: compared with the tensor in which all other elements are zero."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch

from shardsave._common import backend
from shardsave._common.sources import TensorSource
from shardsave._engine.row_sums import row_sums
from shardsave._format import crc64
from shardsave._ranks import box_sums
from shardsave._ranks.box_sums import Summand, runs_of


def added_by(tensor: torch.Tensor, begin: tuple[int, ...]) -> int:
    """What the whole of ``tensor``, a box that begins at ``begin`` in `WHOLE`, adds."""
    runs = runs_of(WHOLE, tensor.element_size(), (begin, tuple(tensor.shape)))
    return int(box_sums.box_sums([Summand(TensorSource.of(tensor), runs)], 1, lambda: None)[0])


WHOLE = (6, 1, 5, 7)


@pytest.mark.parametrize("step", [40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_boxes_anywhere(step: int, dtype: torch.dtype) -> None:
    """Catches a box that is summed as if its elements were elsewhere: rows, columns, blocks, single elements, the whole, in several steps;
    and one whose memory is not that of the file."""
    chance = random.Random(0)
    whole = torch.randint(1, 100, WHOLE).to(dtype)
    with mock.patch.object(box_sums, "_STEP", step):
        for trial in range(60):
            sizes = tuple(chance.choice((size, chance.randint(1, size))) for size in WHOLE)
            begin = tuple(chance.randint(0, size - part) for size, part in zip(WHOLE, sizes))
            place = tuple(slice(at, at + part) for at, part in zip(begin, sizes))
            alone = torch.zeros_like(whole)
            alone[place] = whole[place]
            box = whole[place] if trial % 2 else whole[place].contiguous()
            expected = crc64.raw(alone.reshape(-1).view(torch.uint8).numpy())
            assert added_by(box, begin) == expected, (begin, sizes)


def test_long_runs_and_known_checksums() -> None:
    """Catches a run of more than one step that is summed wrongly, and a known checksum that is computed again or put in the wrong place."""
    whole = torch.arange(3 * 4 * 100_000, dtype=torch.float32).view(3, 4, 100_000)
    alone = torch.zeros_like(whole)
    alone[:, 1:3] = whole[:, 1:3]
    columns = Summand(TensorSource.of(whole[:, 1:3].contiguous()), runs_of((3, 4, 100_000), 4, ((0, 1, 0), (3, 2, 100_000))))
    row = whole[1].contiguous()
    known = Summand(None, runs_of((3, 4, 100_000), 4, ((1, 0, 0), (1, 4, 100_000))), crc64.crc64(row.view(-1).numpy()))  # type: ignore[arg-type]
    only = torch.zeros_like(whole)
    only[1] = row
    found = box_sums.box_sums([columns, known], 1, lambda: None).tolist()
    assert found == [crc64.raw(tensor.view(-1).view(torch.uint8).numpy()) for tensor in (alone, only)]


@pytest.mark.parametrize("name", ["vpclmulqdq", "pclmulqdq", "pmull", "table", "portable"])
def test_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that an implementation sums wrongly: of any length, number and distance, with what lies before them in memory."""
    native, best = backend.native, ""
    if name == "portable":
        monkeypatch.setattr(backend, "native", None)
    elif native is None:
        pytest.skip("the extension is not in use")
    else:
        best = native.crc64_implementation()
        if not native.crc64_force_implementation(name):
            pytest.skip(f"this processor has no {name}")
    chance = random.Random(0)
    data = np.random.default_rng(0).integers(0, 256, 650_000, dtype=np.uint8)
    lines, expected = [], []
    for length in (1, 3, 8, 15, 16, 17, 31, 61, 63, 64, 65, 127, 128, 129, 1000, *((70_000,) if best else ())):
        for rows in (1, 2, 3, 4, 5, 9):
            begin, step = chance.randrange(9), length + chance.choice((0, 1, 7, 64, 500))
            lines.append((data.ctypes.data + begin, rows, length, step))
            apart = np.zeros((rows, step), np.uint8)
            apart[:, :length] = data[begin : begin + rows * length].reshape(rows, length)
            expected.append(crc64.raw(apart.reshape(-1)[: (rows - 1) * step + length]))
    try:
        assert row_sums(np.array(lines, np.int64)).tolist() == expected
    finally:
        if best and native is not None:
            native.crc64_force_implementation(best)


def test_sums_of_many_boxes_take_one_call() -> None:
    """Catches a call of the extension for each row or each small box."""
    tensors = [torch.randn(50, 8) for _ in range(200)]
    calls: list[int] = []

    def note(table: np.ndarray) -> np.ndarray:
        calls.append(len(table))
        return row_sums(table)

    with mock.patch.object(box_sums, "row_sums", note):
        parts = [Summand(TensorSource.of(tensor), runs_of((50, 32), 4, ((0, 8), (50, 8)))) for tensor in tensors]
        found = box_sums.box_sums(parts, 1, lambda: None)
    assert calls == [200]
    alone = torch.zeros(50, 32)
    alone[:, 8:16] = tensors[-1]
    assert found[-1] == crc64.raw(alone.view(-1).view(torch.uint8).numpy())
