"""Ranks of several hosts with networks, host names and disks of their own: they save and load together, and are cut off from each other.

Two ranks are on each host. The store of the job is served by rank 0. Method: ``networks.py``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from networks import network, set_link
from sharded import Net, check_equal, rows

import shardsave
from faults.savers import litter_in
from jobs import Ended, Job
from shardsave._ranks.exchange import Exchange

#: Seconds without a sign of life in these tests.
SILENCE = 6.0


def cut_off(seconds: float) -> None:
    """Cuts this host off, for ``seconds``, or for good if that is 0."""
    set_link("down")
    if seconds:
        time.sleep(seconds)
        set_link("up")


def save_and_load(rank: int, folder: Path, seed: int, cut: int = -1, seconds: float = 0.0) -> Any:
    """Saves; the host of rank ``cut`` is cut off when that rank begins to exchange. Returns the error, the name of the host, the time."""
    net = Net(seed)
    rows(net)
    start = Exchange.start

    def start_and_cut(exchange: Exchange) -> None:
        start(exchange)
        if rank == cut:
            cut_off(seconds)

    begun = time.monotonic()
    try:
        with mock.patch.object(Exchange, "start", start_and_cut):
            shardsave.save(net, folder, max_shard_size="1KB", rank_timeout=SILENCE)
    except shardsave.ShardSaveError as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    loaded = Net(seed + 1)
    rows(loaded)
    shardsave.load_model(loaded, folder)
    check_equal(loaded, Net(seed))
    return "", os.uname().nodename, time.monotonic() - begun


def ran(folder: Path, hosts: int, *arguments: Any) -> list[Ended]:
    with (
        network(folder, hosts) as place,
        Job(2 * hosts, save_and_load, folder / "disk" / "ckpt", *arguments, place=place, store_in="rank 0") as job,
    ):
        return job.ended(300)  # longer than any limit of the product, so that its own error is seen


def test_two_hosts(tmp_path: Path) -> None:
    """Catches ranks of two networks that are taken for ranks of one host, whose sockets they do not find."""
    ends = ran(tmp_path, 2, 3)
    assert [end.value and end.value[:2] for end in ends] == [("", f"node{rank // 2}") for rank in range(4)], ends
    assert not litter_in(tmp_path / "disk" / "ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_host_that_is_cut_off(tmp_path: Path, hosts: int) -> None:
    """Catches ranks that wait for a host that is cut off for good, on either side, that do not name it, and a half save."""
    last = 2 * hosts - 1
    ends = ran(tmp_path, hosts, 3, last)
    assert {end.value[0] for end in ends[: last - 1]} == {"SaveNotCommittedError"}, ends
    assert {end.value[0] for end in ends[last - 1 :]} <= {"SaveNotCommittedError", "DurabilityUncertainError"}, ends
    assert all(end.value[2] < 5 * SILENCE for end in ends), ends
    words = f"rank {last - 1} (node{hosts - 1}) was lost: a sign of life was expected within rank_timeout={SILENCE:g} s"
    assert {words in end.value[1] for end in ends[: last - 1]} == {True}, ends
    assert len({end.value[1] for end in ends[: last - 1]}) == 1, ends
    assert all("the store of torch.distributed does not answer" in end.value[1] for end in ends[last - 1 :]), ends
    folder = tmp_path / "disk" / "ckpt"
    assert not [*folder.iterdir()], [*folder.iterdir()]
    shardsave.save(Net(5), folder)
    assert not litter_in(folder)


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_a_moment(tmp_path: Path) -> None:
    """Catches a save that does not survive a short fault of the network."""
    ends = ran(tmp_path, 2, 3, 3, SILENCE / 4)
    assert [end.value and end.value[:2] for end in ends] == [("", f"node{rank // 2}") for rank in range(4)], ends


@pytest.mark.slow
def test_hosts_with_disks_of_their_own(tmp_path: Path) -> None:
    """Catches a save whose files are on two disks; all ranks must be told, and nothing may stay on any of them."""
    (tmp_path / "own-1").mkdir()
    ends = ran(tmp_path, 2, 3)
    assert len({end.value and end.value[:2] for end in ends}) == 1, ends
    assert "it is not a shared directory" in ends[0].value[1], ends
    assert not [*tmp_path.glob("disk/ckpt/*"), *tmp_path.glob("own-1/*/*")]
