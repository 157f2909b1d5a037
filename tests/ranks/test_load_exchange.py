"""Loads over ranks: each rank's boxes hold what the file says, whoever has read it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_save_exchange import model

from jobs import run_ranks
from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box
from shardsave._common.spread import Spread
from shardsave._engine import engine
from shardsave._engine.blocks import blocks
from shardsave._format.crc64 import crc64
from shardsave._ranks import open_session as sessions
from shardsave._ranks.load_exchange import LoadExchange, Reading


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read(rank: int, path: str, size: int, portable: bool, hosts: tuple[int, ...], part: int) -> tuple[list[int], int, int]:
    """Every rank reads ranges of ``part`` elements in turn. Returns the sums of this rank's pieces and what it has exchanged."""
    if portable:
        from shardsave._common import backend

        backend.native = None
    tensors = model(size)
    targets, rows, at = [], [[] for _ in range(size)], 129
    for number, (whole, layout) in enumerate(tensors.values()):
        order = [(begin, torch.full(sizes, 77).to(whole.dtype)) for begin, sizes in layout.boxes(rank)]
        if number % 3 == 1:
            order = [(begin, held.mT.contiguous().mT if held.ndim > 1 else held) for begin, held in order]
        targets.append(Spread(whole.dtype, layout, [Chunk(begin, held) for begin, held in order]))
        step = part * whole.element_size()
        for turn, begin in enumerate(range(0, whole.nbytes, step)):
            length = min(step, whole.nbytes - begin)
            rows[(turn + number) % size].append((0, at + begin, length, whole.element_size(), number, begin))
        at += whole.nbytes
    readings = []
    for mine in rows:
        table = np.array(mine, dtype=np.int64).reshape(-1, 6)
        readings.append(Reading(table[:, :4], table[:, 4].tolist(), table[:, 5].tolist()))
    fd = os.open(path, os.O_RDONLY)
    with sessions.begin(dist.group.WORLD, "load", path) as session:
        session.hosts = hosts
        delivering = LoadExchange(session, readings, targets)
        with closing(delivering.exchange) as exchange:
            exchange.start()
            own = [(0, 0, 100, 1), (0, 100, 29, 1)]
            planned, pieces, windows = delivering.run(blocks(np.array(own, dtype=np.int64), 4096), [None, None])
            done = engine.read([fd], planned, pieces, windows=windows, tick=lambda _: session.check())
            exchange.finish()
    for (name, (whole, _)), target in zip(tensors.items(), targets):
        for chunk in target.local:
            assert as_bytes(chunk.tensor) == as_bytes(whole[box(chunk.begin, chunk.tensor.shape)]), f"{name} on rank {rank}"
    contents = Path(path).read_bytes()
    assert list(done.sums) == [crc64(contents[o : o + n]) for _, o, n, *_ in (*rows[rank], *own)]
    return exchange.sent_bytes, exchange.received_bytes, exchange.peak_bytes


@pytest.mark.parametrize(
    "hosts, part, portable",
    [
        ((0, 0, 0, 0), 100_000, False),
        ((0, 0, 0, 0), 10**9, False),
        ((0, 0), 70_001, True),
        ((0,), 100_000, False),
        ((0, 1, 2, 3), 50_000, False),
        ((0, 0, 1, 1), 10**9, False),
    ],
)
def test_every_box(tmp_path: Path, hosts: tuple[int, ...], part: int, portable: bool) -> None:
    """Catches a box that gets other bytes than the file has, for any layout, dtype, and split of the reading; and a wrong checksum."""
    size = len(hosts)
    path = tmp_path / "file"
    path.write_bytes(b"-" * 129 + b"".join(as_bytes(whole) for whole, _ in model(size).values()))
    ends = run_ranks(size, read, str(path), size, portable, hosts, part)
    assert sum(end[0] for end in ends) == sum(end[1] for end in ends)
    assert (size == 1) == (ends[0][0] == 0)
    assert max(end[2] for end in ends) <= 192 << 20
