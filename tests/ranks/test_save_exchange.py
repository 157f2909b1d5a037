"""Saves over ranks: the bytes that owners write are those of the whole tensors, whoever holds them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs import run_ranks
from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box
from shardsave._common.layouts import Grid, Layout, Listed, Placed, Split, Whole
from shardsave._common.spread import Spread
from shardsave._engine import engine
from shardsave._ranks import open_session as sessions
from shardsave._ranks.save_exchange import SaveExchange
from shardsave._saving.packings import plan_shards
from shardsave._saving.shards import PlannedShard, plan_blocks
from shardsave._state.module import Entry


def spread(whole: torch.Tensor, layout: Layout, rank: int) -> Spread:
    """What ``rank`` has of ``whole``."""
    held = [Chunk(begin, whole[box(begin, sizes)].clone()) for begin, sizes in layout.boxes(rank)]
    return Spread(whole.dtype, layout, held)


def rows(shape: Sequence[int], size: int) -> Layout:
    return Placed(Grid(range(size), (size,)), (Split(0),), shape)


def columns(shape: Sequence[int], size: int) -> Layout:
    return Placed(Grid(range(size), (size,)), (Split(1),), shape)


def model(size: int) -> dict[str, tuple[torch.Tensor, Layout]]:
    """Whole tensors and where they are: all kinds of layouts, dtypes and sizes."""
    torch.manual_seed(0)
    grid = Grid(range(size), (size // 2, 2)) if size > 1 else Grid([0], (1, 1))
    tensors: dict[str, tuple[torch.Tensor, Layout]] = {}

    def add(name: str, whole: torch.Tensor, layout: Layout) -> None:
        tensors[name] = whole, layout

    add("rows", torch.randn(1001, 2048), rows((1001, 2048), size))
    add("columns", torch.randn(3000, 1030), columns((3000, 1030), size))
    add("few", torch.randn(1, 7), rows((1, 7), size))
    add("empty", torch.randn(0, 7), rows((0, 7), size))
    add("scalar", torch.tensor(3.5), Whole(tuple(range(size)), ()))
    add("half", torch.randn(515, 3, 5, 7).bfloat16(), Placed(Grid(range(size), (size,)), (Split(1),), (515, 3, 5, 7)))
    add("bytes", torch.randint(0, 255, (77, 13), dtype=torch.uint8), columns((77, 13), size))
    add("flags", torch.rand(9, 5) > 0.5, columns((9, 5), size))
    add("float8", torch.randn(64, 48).to(torch.float8_e4m3fn), rows((64, 48), size))
    add("double", torch.randn(40, 30, dtype=torch.float64), Placed(grid, (Split(0), Split(1)), (40, 30)))
    add("replicas", torch.randn(64, 33), Placed(grid, (Split(-1), Split(0)), (64, 33)))
    add("strided", torch.randn(16, 8), Placed(grid, (Split(0, 2), Split(-1)), (16, 8)))
    add("whole", torch.randn(300, 300), Whole(tuple(range(size)), (300, 300)))
    add("on one", torch.randn(10), Whole((size - 1,), (10,)))
    halves = {
        rank: [((0, 0), (4, 3)), ((4, 3), (4, 3))] if rank == 0 else [((0, 3), (4, 3)), ((4, 0), (4, 3))] for rank in range(2)
    }
    if size > 1:
        add("listed", torch.randn(8, 6), Listed(halves, (8, 6)))
    for number in range(50):
        add(f"small.{number}", torch.randn(5, 3), rows((5, 3), size))
    return tensors


def planned(tensors: dict[str, tuple[torch.Tensor, Layout]], rank: int | None, bound: int) -> list[PlannedShard]:
    """The shards of ``tensors`` as ``rank`` holds them; None: as one process with all of them does."""
    entries = []
    for name, (whole, layout) in tensors.items():
        source: Any = (
            spread(whole, layout, rank)
            if rank is not None
            else Spread(whole.dtype, Whole((0,), tuple(whole.shape)), [Chunk((0,) * whole.ndim, whole)])
        )
        entries.append(Entry(name, "parameter", False, None, source))
    return plan_shards(entries, bound)


def write(
    folder: str, shards: Sequence[PlannedShard], numbers: Sequence[int], shipping: SaveExchange | None, check: Any = None
) -> list[list[int]]:
    """Writes ``shards`` as an owner does; returns the sums of each."""
    sums = []
    for number, shard in zip(numbers, shards):
        fd = os.open(f"{folder}/{number}", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, shard.reserved_bytes)
        windows = shipping.windows([shard]) if shipping is not None else None
        transfer = engine.write(
            [fd], plan_blocks([shard]), shard.pieces, access="direct", start_writeback=False, windows=windows,
            tick=lambda _: check and check(),
        )  # fmt: skip
        sums.append(list(transfer.sums))
        os.close(fd)
    return sums


def ship(
    rank: int, folder: str, size: int, bound: int, portable: bool, hosts: tuple[int, ...]
) -> tuple[dict[int, list[int]], int, int, int]:
    if portable:
        from shardsave._common import backend

        backend.native = None
    with sessions.begin(dist.group.WORLD, "save", folder) as session:
        session.hosts = hosts
        shards = planned(model(size), rank, bound)
        owners = [number % size for number in range(len(shards))]
        shipping = SaveExchange(session, shards, owners)
        with closing(shipping.exchange) as exchange:
            exchange.start()
            sums = write(folder, shipping.own, shipping.mine, shipping, session.check)
            exchange.finish()
    return dict(zip(shipping.mine, sums)), exchange.sent_bytes, exchange.received_bytes, exchange.peak_bytes


@pytest.mark.parametrize(
    "hosts, bound, portable",
    [
        ((0, 0, 0, 0), 1_000_000, False),
        ((0, 0, 0, 0), 100_000_000, False),
        ((0, 0), 4_000_000, True),
        ((0,), 100_000_000, False),
        ((0, 1, 2, 3), 1_000_000, False),
        ((0, 0, 1, 1), 4_000_000, False),
    ],
)
def test_the_bytes_of_one_process(tmp_path: Path, hosts: tuple[int, ...], bound: int, portable: bool) -> None:
    """Catches a byte that comes from the wrong place, or not at all, for any layout, dtype and size; and a wrong checksum."""
    size = len(hosts)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    ends = run_ranks(size, ship, str(theirs), size, bound, portable, hosts)
    shards = planned(model(size), None, bound)
    sums = dict(enumerate(write(str(ours), shards, range(len(shards)), None)))
    assert {number: found for end in ends for number, found in end[0].items()} == sums
    for number in range(len(shards)):
        assert (ours / str(number)).read_bytes() == (theirs / str(number)).read_bytes()
    assert sum(end[1] for end in ends) == sum(end[2] for end in ends)
    assert max(end[3] for end in ends) <= 192 << 20
