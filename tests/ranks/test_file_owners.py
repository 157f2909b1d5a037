"""Which rank writes which file."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch

from shardsave._common.layouts import Grid, Layout, Listed, Placed, Split, Whole
from shardsave._common.sources import TensorSource
from shardsave._common.spread import Spread
from shardsave._format.packing import Shard, StoredTensor
from shardsave._ranks.file_owners import _elements_of_each, file_owners
from shardsave._saving.shards import PlannedShard

ROWS = (1024, 256)


def shard(*layouts: Layout, owner: int | None = None) -> PlannedShard:
    """A shard with a tensor of each layout, none of which is here."""
    tensors, begins, end = [], [], 0
    for number, layout in enumerate(layouts):
        spread = Spread(torch.float32, layout, ())
        tensors.append(StoredTensor(f"t{number}", "F32", layout.shape, spread.nbytes, False))
        begins.append(end)
        end += spread.nbytes
    pieces = [Spread(torch.float32, layout, ()) for layout in layouts]
    return PlannedShard(Shard(tuple(tensors), tuple(begins), end), [*pieces], owner=owner)


def rows(ranks: int, parts: int | None = None) -> Placed:
    """Rows on all ``ranks``; with ``parts``, on so many in a row, and the same on the next."""
    if parts is None:
        return Placed(Grid(range(ranks), (ranks,)), [Split(0)], ROWS)
    return Placed(Grid(range(ranks), (ranks // parts, parts)), [Split(-1), Split(0)], ROWS)


@pytest.mark.parametrize("layout", [rows(4), Whole((0, 1, 2, 3), ROWS), rows(4, 2)], ids=["rows", "replicas", "rows twice"])
@pytest.mark.parametrize("hosts", [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)])
def test_shares(layout: Layout, hosts: tuple[int, ...]) -> None:
    """Catches ranks, or hosts, that write more than others although all hold the same."""
    counts = Counter(file_owners([shard(layout, layout)] * 8, hosts))
    assert counts == dict.fromkeys(range(4), 2)


def test_what_one_rank_holds() -> None:
    """Catches a file whose bytes go to another host, or to another rank although their own is free."""
    stages = [shard(Listed({rank: [((0, 0), ROWS)]}, ROWS)) for rank in (2, 0, 3, 1)]
    assert file_owners(stages, (0, 0, 1, 1)) == [2, 0, 3, 1]
    last = [shard(Listed({3: [((0, 0), ROWS)]}, ROWS))] * 4
    assert sorted(file_owners(last, (0, 0, 1, 1))) == [2, 2, 3, 3]


def test_given_owners() -> None:
    """Catches a file of one rank that another writes, and one of plain memory that is not rank 0's."""
    plain = PlannedShard(Shard((StoredTensor("t", "F32", (2,), 8, False),), (0,), 8), [TensorSource.of(torch.zeros(2))])
    assert file_owners([shard(rows(4), owner=3), plain, plain], (0, 0, 0, 0)) == [3, 0, 0]


def test_long_files_first() -> None:
    """Catches files that are given away in their order: the last one, a long one, would be written when all other ranks have ended."""
    long, short = shard(*[rows(4)] * 6), shard(*[rows(4)] * 4)
    shards = [long, *[short] * 8, shard(), long]
    loads = Counter[int]()
    for one, owner in zip(shards, file_owners(shards, (0, 0, 0, 0))):
        loads[owner] += one.layout.data_bytes
    assert sorted(loads.values()) == [n * short.layout.data_bytes // 4 for n in (10, 10, 12, 12)]


def test_given_files_count_first() -> None:
    """Catches a rank that gets files although it alone must write many."""
    shards = [shard(rows(4)), shard(rows(4)), shard(rows(4), rows(4), owner=0)]
    assert 0 not in file_owners(shards, (0, 0, 0, 0))[:2]


def test_empty_tensors() -> None:
    """Catches a division by the number of elements, or of bytes."""
    nothing = Whole((0, 1), (0, 4))
    assert set(file_owners([shard(nothing), shard()], (0, 0))) <= {0, 1}


#: Meshes of eight ranks, one with processes that are in no group, and how a tensor is placed on them.
GRIDS = (Grid(range(8), (8,)), Grid((3, 1, 0, 2, 7, 6, 5, 4), (2, 4)), Grid((-1, 1, 0, 2, -1, 6, 5, 4), (4, 2)))
SPLITS = ((Split(0), Split(0)), (Split(1), Split(0)), (Split(-1), Split(1)), (Split(0, 2), Split(0)), (Split(0), Split(0, 3)))


@pytest.mark.parametrize("grid", GRIDS, ids=[str(grid.sizes) for grid in GRIDS])
@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("shape", [(16, 8), (13, 5), (3, 7), (1, 1), (0, 4)], ids=str)
def test_parts(grid: Grid, splits: tuple[Split, ...], shape: tuple[int, int]) -> None:
    """Catches a number of elements that is not that of the boxes: uneven, empty, in groups, twice along one dimension."""
    layout = Placed(grid, splits[: len(grid.sizes)], shape)
    held = [sum(math.prod(sizes) for _, sizes in layout.boxes(rank)) for rank in range(8)]
    assert _elements_of_each(layout, 8).tolist() == held


def test_time() -> None:
    """Catches arithmetic for each tensor and rank, or each file and rank: 100,000 tensors in 500 files of 10,000 ranks."""
    layouts = [Placed(Grid(range(10_000), (10_000,)), [Split(0)], (10_000 + n, 8)) for n in range(10)]
    shards = [shard(*layouts * 20) for _ in range(500)]
    hosts = [rank // 8 for rank in range(10_000)]
    started = time.process_time()
    found = file_owners(shards, hosts)
    assert time.process_time() - started < 2
    assert len(set(found)) > 400
