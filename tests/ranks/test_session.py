"""Sessions: how ranks meet, what they tell each other, and how all of them learn of one's error."""

from __future__ import annotations

import torch.distributed as dist

from jobs import Job, run_ranks
from shardsave._ranks.session import begin
from shardsave.errors import OutOfSpaceError


def tell(rank: int) -> object:
    with begin(dist.group.WORLD, "save", "ckpt") as session:
        values = session.exchange("values", b"%d" % rank * (rank * (1 << 20)))
        gathered = session.gather("others", b"g%d" % rank)
        published = session.publish("decision", b"yes" if session.leads else None)
        return [len(value) for value in values], gathered, published, session.hosts


def fail_on_two(rank: int) -> None:
    with begin(dist.group.WORLD, "save", "ckpt") as session:
        session.exchange("values", b"")
        if rank == 2:
            raise OutOfSpaceError("cannot write a: No space left on device")
        session.exchange("more", b"")


def test_values() -> None:
    """Catches values that are lost, cut or come in another order."""
    for rank, (values, gathered, published, hosts) in enumerate(run_ranks(4, tell)):
        assert values == [0, 1 << 20, 2 << 20, 3 << 20]
        assert gathered == (None if rank else [b"g0", b"g1", b"g2", b"g3"])
        assert (published, hosts) == (b"yes", (0, 0, 0, 0))


def test_an_error() -> None:
    """Catches ranks that end with another error than the one that struck."""
    with Job(4, fail_on_two) as job:
        ends = job.ended()
    assert {(end.error, end.message) for end in ends} == {
        ("OutOfSpaceError", "rank 2: cannot write a: No space left on device")
    }
