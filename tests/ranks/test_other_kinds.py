"""Ranks of one group that wait for each other in calls of different kinds, so that none of these can come about, are told at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from test_failing_loads import raised
from torch import nn

import shardsave
from jobs import run_ranks
from shardsave._ranks import arrivals

RANKS = 3

#: Seconds until ranks are told that they wait for each other: much less than ``rank_timeout``, also where the machine is busy.
SOON = 30.0


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.ones(64) for name in "abcd"}


def save(folder: Path, **options: Any) -> object:
    return shardsave.save(tensors(), folder / "ckpt", process_group=dist.group.WORLD, durable=False, **options)


def save_async(folder: Path, **options: Any) -> object:
    return shardsave.save_async(tensors(), folder / "ckpt", process_group=dist.group.WORLD, durable=False, **options).wait(60)


def manage(folder: Path, **options: Any) -> object:
    with shardsave.CheckpointManager(
        folder / "ckpt", save_every=None, process_group=dist.group.WORLD, durable=False, **options
    ) as manager:
        return manager.save(1, nn.Linear(2, 2))


def load(folder: Path) -> object:
    return shardsave.load_model(nn.Linear(2, 2), folder / "ckpt", process_group=dist.group.WORLD)


SAVE, ASYNC, IF_BUSY = "save to {0}", "save to {0} in the background (save_async)", " with if_busy='skip' or 'raise'"

#: Case → what rank 0, rank 1 and rank 2 call, and what they are told of the ranks.
CASES: dict[str, tuple[tuple[Callable[..., object], dict[str, Any]], ...]] = {
    "rank 0 does not wait": ((save_async, {}), (save, {}), (save, {})),
    "only rank 0 waits": ((save, {}), (save_async, {}), (save_async, {})),
    "rank 2 waits": ((save_async, {}), (save_async, {}), (save, {})),
    "rank 1 skips": ((save_async, {}), (save_async, {"if_busy": "skip"}), (save_async, {})),
    "three ways": ((save_async, {"if_busy": "raise"}), (save, {}), (save_async, {})),
    "one manager is asynchronous": ((manage, {}), (manage, {"asynchronous": True}), (manage, {})),
    "rank 1 loads": ((save_async, {}), (load, {}), (save_async, {})),
}
TOLD = {
    "rank 0 does not wait": f"rank 0: {ASYNC}; ranks 1, 2: {SAVE}",
    "only rank 0 waits": f"rank 0: {SAVE}; ranks 1, 2: {ASYNC}",
    "rank 2 waits": f"ranks 0, 1: {ASYNC}; rank 2: {SAVE}",
    "rank 1 skips": f"ranks 0, 2: {ASYNC}; rank 1: {ASYNC}{IF_BUSY}",
    "three ways": f"rank 0: {ASYNC}{IF_BUSY}; rank 1: {SAVE}; rank 2: {ASYNC}",
    "one manager is asynchronous": f"ranks 0, 2: {SAVE}/step-00000001; rank 1: {ASYNC.replace('{0}', '{0}/step-00000001')}",
    "rank 1 loads": f"ranks 0, 2: {ASYNC}; rank 1: load {{0}}",
}


def call_differently(rank: int, folder: Path) -> list[Any]:
    """For each case: what this rank raised, whether it was soon, and what the next call of all returned."""
    ends = []
    with mock.patch.object(arrivals, "_PAUSE", 0.05):
        for number, case in enumerate(CASES.values()):
            dist.barrier()
            call, options = case[rank]
            began = time.monotonic()
            error = raised(lambda: call(folder / str(number), **options))
            soon = time.monotonic() - began < SOON
            then = raised(lambda: (save_async, save)[number % 2](folder / "then"))
            ends.append((error, soon, then))
    return ends


def test_calls_of_different_kinds(tmp_path: Path) -> None:
    """Catches ranks that are told of each other's calls only after `rank_timeout`, not on all, or not what each has called, and a next
    call that is disturbed."""
    for by_rank in run_ranks(RANKS, call_differently, tmp_path):
        for number, (case, (error, soon, then)) in enumerate(zip(CASES, by_rank, strict=True)):
            where = tmp_path / str(number) / "ckpt"
            own = f"{where}/step-00000001" if "manager" in case else where
            told = TOLD[case].format(where)
            words = f"cannot save to {own}: all ranks were expected to make the same call, found {told}; nothing was read or written"
            assert error == ("ValueError", words), (case, error)
            assert soon and then == ("", ""), (case, then)


def differ_in_if_busy(rank: int, folder: Path) -> tuple[str, str]:
    return raised(lambda: save_async(folder, if_busy="raise" if rank == 2 else "skip"))


def test_if_busy_that_differs(tmp_path: Path) -> None:
    """Catches ranks of which some would skip a save and others raise, although rank 0 decides for all whether it is made."""
    told = f"cannot save to {tmp_path / 'ckpt'}: the same if_busy was expected on all ranks, it is 'skip' on rank 0, 'raise' on rank 2"
    for kind, message in run_ranks(RANKS, differ_in_if_busy, tmp_path):
        assert kind == "ValueError" and message == f"{told}; nothing was written"


def save_in_other_orders(rank: int, folder: Path) -> list[tuple[str, str]]:
    """What this rank was told in calls in which ranks wait in different kinds for a while, and meet all the same."""
    ends = []
    with mock.patch.object(arrivals, "_PAUSE", 0.05):
        save(folder)
        # A thread of each rank verifies, while its main thread saves; rank 0 comes to them in the other order.
        verify = threading.Thread(
            target=lambda: ends.append(raised(lambda: shardsave.verify(folder / "ckpt", process_group=dist.group.WORLD)))
        )
        if rank:
            verify.start()
            time.sleep(0.5)
        else:
            threading.Timer(0.5, verify.start).start()
        ends.append(raised(lambda: save_async(folder.joinpath("other"))))
        while not verify.ident:
            time.sleep(0.01)
        verify.join()

        # Rank 1 comes late to a save, while one in the background is at work, for which it once waited.
        held = threading.Event()
        pending = shardsave.save_async(
            tensors(),
            folder / "held",
            process_group=dist.group.WORLD,
            durable=False,
            progress=lambda *_: held.wait(60) and None,
        )
        time.sleep(0.5 if rank == 1 else 0)
        ends.append(raised(lambda: save(folder)))
        held.set()
        pending.wait(60)
    return ends


def test_other_orders(tmp_path: Path) -> None:
    """Catches ranks that are refused although they meet as soon as the slower ones come: threads have calls of their own, and a save in
    the background goes on beside other calls."""
    assert run_ranks(RANKS, save_in_other_orders, tmp_path) == [[("", "")] * 3] * RANKS


def fall_behind(rank: int, folder: Path) -> list[str]:
    """Rank 1 has made one call more than rank 0, by itself: it waits in the call that rank 0 makes next."""
    ends = []
    with mock.patch.object(arrivals, "_PAUSE", 0.05):
        if rank == 1:
            ends.append(raised(lambda: save(folder, rank_timeout=0.2))[1])
        dist.barrier()
        if rank == 0:
            ends.append(raised(lambda: save(folder, rank_timeout=1.0))[1])
        ends.append(raised(lambda: save_async(folder))[1])
        if rank == 1:
            raised(lambda: save(folder, rank_timeout=0.2))
        dist.barrier()
        ends.append(raised(lambda: save_async(folder))[1])
        dist.barrier()
        ends.append(raised(lambda: (save if rank else save_async)(folder))[1])  # all count from the last call in which they met
    return ends


def test_a_rank_that_is_behind(tmp_path: Path) -> None:
    """Catches a rank that is refused although the other one is only one call behind, and ranks that are told nothing ever after."""
    for missing, (alone, then, again, at_last) in zip(("rank 1", "rank 0"), run_ranks(2, fall_behind, tmp_path), strict=True):
        assert f"{missing} did not" in alone and then == again == "", (alone, then, again)
        assert f"rank 0: {ASYNC.format(tmp_path / 'ckpt')}; rank 1: {SAVE.format(tmp_path / 'ckpt')}" in at_last, at_last


def alone_with_a_manager(rank: int, folder: Path) -> tuple[str, str]:
    with shardsave.CheckpointManager(folder, save_every=1, process_group=dist.group.WORLD, rank_timeout=0.5) as manager:
        told = raised(lambda: manager.step(1, nn.Linear(2, 2))) if rank == 1 else ("", "")
    dist.barrier()
    return told


def test_a_step_of_one_rank_alone(tmp_path: Path) -> None:
    """Catches a step of one rank that the others do not make, and that ends in another error than a save that is not made."""
    _, (kind, message), _ = run_ranks(RANKS, alone_with_a_manager, tmp_path)
    assert kind == "SaveNotCommittedError" and message.startswith(f"cannot save to {tmp_path}: all 3 ranks"), (kind, message)
    assert "ranks 0, 2 did not" in message and message.endswith("; nothing was committed")


def wait_on_threads(rank: int, folder: Path) -> str:
    """What a thread of each rank is told in its call: on rank 1 another one than on the others, which its main thread might still make."""
    call, seconds = ((save, 2.0), (save_async, 5.0), (save, 60.0))[rank]
    ends: list[str] = []
    thread = threading.Thread(target=lambda: ends.append(raised(lambda: call(folder, rank_timeout=seconds))[1]))
    if rank == 0:  # the others are there
        time.sleep(0.5)
    thread.start()
    thread.join()
    return ends[0]


def test_calls_on_threads(tmp_path: Path) -> None:
    """Catches ranks that are told that a rank did not come, and not that it waits in another call, as far as rank 0 sees it."""
    first, other, last = run_ranks(RANKS, wait_on_threads, tmp_path)
    where = tmp_path / "ckpt"
    assert (
        first == last and f"rank 1 did not, or ended; meanwhile, rank 1 waited for all ranks to {ASYNC.format(where)};" in first
    )
    assert "ranks 0, 2 did not, or ended; the call is collective" in other
