"""The boxes of tensors that are distributed over a mesh, compared with how torch itself splits them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from shardsave._common.assembled import Chunk
from shardsave._common.boxes import box
from shardsave._common.layouts import Extent, Grid, Joined, Layout, Listed, Placed, Split, Whole
from shardsave._common.spread import Spread, local_chunks

CASES = 900


def splits(placements: list[Placement]) -> list[Split]:
    return [
        Split(-1) if isinstance(p, Replicate) else Split(p.dim, getattr(p, "split_factor", 1))  # type: ignore[attr-defined]
        for p in placements
    ]


def random_case(rng: random.Random) -> tuple[list[int], list[int], list[Placement]]:
    """Sizes of a mesh, a shape, placements."""
    sizes = [rng.choice((1, 2, 3, 4)) for _ in range(rng.choice((1, 2, 3)))]
    shape = [rng.randint(0, 13) for _ in range(rng.choice((1, 2, 3)))]
    dims = range(len(shape))
    kinds = [lambda: Replicate(), lambda: Shard(rng.choice(dims)), lambda: Shard(0)]
    kinds.append(lambda: _StridedShard(rng.choice(dims), split_factor=rng.choice((2, 3, 4))))
    return sizes, shape, [rng.choice(kinds)() for _ in sizes]


def as_torch_splits(
    whole: torch.Tensor, sizes: list[int], coordinates: tuple[int, ...], placements: list[Placement]
) -> torch.Tensor:
    for size, at, placement in zip(sizes, coordinates, placements):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(whole, size, with_padding=False, contiguous=True)  # type: ignore[attr-defined]
            whole = parts[at] if at < len(parts) else whole.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return whole


def test_boxes_are_those_of_torch() -> None:
    """Catches a box of a rank that torch splits in another way: uneven, strided, several dimensions of the mesh, nothing at all."""
    rng = random.Random(1)
    several = empty = 0
    for _ in range(CASES):
        sizes, shape, placements = random_case(rng)
        layout = Placed(Grid(range(math.prod(sizes)), sizes), splits(placements), shape)
        whole = torch.arange(math.prod(shape)).reshape(shape)
        for rank, coordinates in enumerate(itertools.product(*map(range, sizes))):
            local = as_torch_splits(whole, sizes, coordinates, placements)
            chunks = local_chunks(layout, rank, local)
            assert [chunk.begin for chunk in chunks] == [begin for begin, _ in layout.boxes(rank)]
            several += len(chunks) > 1
            empty += not chunks
            for chunk in chunks:
                assert torch.equal(chunk.tensor, whole[box(chunk.begin, chunk.tensor.shape)]), (sizes, shape, placements, rank)
            assert sum(chunk.tensor.numel() for chunk in chunks) == local.numel()
    assert several > CASES / 10 and empty > CASES / 10


def random_layout(rng: random.Random) -> tuple[Layout, int]:
    """A layout that covers its tensor, and the number of its ranks."""
    sizes, shape, placements = random_case(rng)
    size = math.prod(sizes)
    placed = Placed(Grid(rng.sample(range(size), size), sizes), splits(placements), shape)
    kind = rng.choice(("placed", "joined", "listed"))
    if kind == "placed":
        return placed, size
    if kind == "listed":
        return Listed({rank: placed.boxes(rank) for rank in range(size)}, shape), size
    more = rng.randint(1, 3)
    return Joined([placed, Whole(range(size, size + more), tuple(shape))], [0] * size + [1] * more), size + more


def filled(boxes: list[Extent], shape: tuple[int, ...]) -> np.ndarray:
    counts = np.zeros(shape, np.int32)
    for begin, sizes in boxes:
        counts[box(begin, sizes)] += 1
    return counts


def test_each_element_comes_from_one_rank() -> None:
    """Catches an element that nobody or two ranks give to the owner, one from a rank without it, and one that the owner has itself."""
    rng = random.Random(2)
    for _ in range(CASES // 3):
        layout, size = random_layout(rng)
        spread = Spread(torch.float32, layout, ())
        hosts = [rng.randrange(3) for _ in range(size)]
        owner = rng.randrange(size)
        given = spread.senders(owner, hosts)
        counts = filled([part for _, part in given], layout.shape)
        assert (counts == 1).all()
        for rank in range(size):
            sent = [part for sender, part in given if sender == rank]
            held = filled(list(layout.boxes(rank)), layout.shape)
            assert (filled(sent, layout.shape) <= held).all()
            if rank == owner:
                assert (filled(sent, layout.shape) == held).all()
            elif hosts[rank] != hosts[owner] and sent:
                for other in range(size):
                    if hosts[other] == hosts[owner]:
                        assert not (filled(sent, layout.shape) & filled(list(layout.boxes(other)), layout.shape)).any()


def test_a_tensor_that_is_whole_here() -> None:
    """Catches wrong bytes of a tensor in several boxes, a range that begins inside a row, and whole memory that is not used as it is."""
    whole = torch.arange(24, dtype=torch.int32).reshape(6, 4)
    layout = Placed(Grid([0], [1]), [Split(0, 3)], (6, 4))
    parts = Listed({0: [((0, 0), (6, 2)), ((0, 2), (6, 2))]}, (6, 4))
    spread = Spread(torch.int32, layout, local_chunks(layout, 0, whole))
    assert spread.memory() == (-1, whole.data_ptr()) and spread.nbytes == 96
    split = Spread(torch.int32, parts, [Chunk((0, 0), whole[:, :2].clone()), Chunk((0, 2), whole[:, 2:])])
    assert split.memory() is None and split.is_whole
    for source in (spread, split):
        view = bytearray(40)
        source.gather(12, memoryview(view))
        assert torch.equal(torch.frombuffer(view, dtype=torch.int32), whole.reshape(-1)[3:13])


def test_a_part_of_a_tensor() -> None:
    """Catches elements of others in the place of those of this rank when a load stores all, and a part that passes for the whole."""
    layout = Placed(Grid([0, 1], [2]), [Split(1)], (3, 5))
    local = torch.zeros(3, 2)
    spread = Spread(torch.float32, layout, local_chunks(layout, 1, local))
    whole = torch.arange(15.0)
    spread.scatter(0, memoryview(whole[:7].numpy()).cast("B"))
    spread.scatter(28, memoryview(whole[7:].numpy()).cast("B"))
    assert torch.equal(local, whole.reshape(3, 5)[:, 3:])
    with pytest.raises(ValueError, match="holds only a part"):
        spread.gather(0, memoryview(bytearray(4)))
    with pytest.raises(ValueError, match=r"shape \[3, 2\] was expected on this rank, it has \[3, 3\]"):
        local_chunks(layout, 1, torch.zeros(3, 3))
    assert spread.stand_in.shape == (3, 5) and spread.stand_in is spread.stand_in
