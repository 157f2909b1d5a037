"""What boxes add to the checksum of their tensor: compared with the tensor in which all other elements are zero."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch

from shardsave._common.sources import TensorSource
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


@pytest.mark.parametrize("length", [1, 7, 8, 61, 4096])
def test_rows(length: int) -> None:
    """Catches rows that the C++ core or numpy sums wrongly, of any length and distance."""
    rows, step = 9, length + 13
    data = np.random.default_rng(length).integers(0, 256, rows * length, dtype=np.uint8)
    apart = np.zeros((rows, step), np.uint8)
    apart[:, :length] = data.reshape(rows, length)
    expected = crc64.raw(apart.reshape(-1)[: (rows - 1) * step + length])
    assert crc64.raw_of_rows(data, rows, step) == expected
    with mock.patch.object(crc64, "native", None):
        assert crc64.raw_of_rows(data, rows, step) == expected
