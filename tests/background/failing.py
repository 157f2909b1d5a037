"""Saves in the background that fail or are cancelled at random moments, in a process with the library beneath libc preloaded.

``python -m background.failing TRIALS SEED FOLDER``: prints how many saves were committed, cancelled and failed. Fails if a checkpoint is
neither the old nor the new one, whole, or if a descriptor, a thread, a lock, a hook or a staging directory is left.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

import shardsave
from background.held import assert_nothing_is_left, value_in
from background.saving import hooks
from faults.beneath import Fate, arm, disarm
from faults.scenarios import held, nothing_leaked
from shardsave._background.failures import take_failures
from shardsave._storage.transaction import Transaction

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EMFILE, errno.EROFS)

#: The most system calls on files that a save makes here.
CALLS = 120


class Records(logging.Handler):
    """Counts log records of failed and cancelled saves."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.events[record.shardsave["event"]] += 1  # type: ignore[attr-defined]


def trial(number: int, folder: Path, chance: random.Random, net: torch.nn.Module, optimizer: Any) -> BaseException | None:
    """One save of the value ``number``, while training goes on. Returns its error."""
    way = chance.choice(["disk", "disk", "cancel", "cancel", "busy", "unwritable", "changed", "well"])
    options: dict[str, Any] = {"staging": chance.choice(["snapshot", "ring"]), "durable": chance.random() < 0.5}
    path = folder / "ckpt"
    if way == "unwritable":
        path = folder / "file" / "ckpt"
    if way == "disk":
        arm(folder, chance.randrange(1, CALLS), chance.choice([Fate.FAIL, Fate.FAIL_FROM_HERE]), chance.choice(ERRORS))
    with Transaction(path, durable=False, lock_timeout=5) if way == "busy" else nullcontext():
        pending = shardsave.save_async(
            net, path, training={"optimizer": optimizer}, lock_timeout=0.02 if way == "busy" else 5, **options
        )
        if way == "cancel":
            time.sleep(chance.random() * 0.006)
            pending.cancel()
        if way == "changed":
            with torch.no_grad():
                net.get_parameter("weight").add_(0)  # no hook sees this
        if way != "busy":
            optimizer.step()
        assert pending.staged.wait(30)
        with suppress(Exception):
            pending.wait(30)
    disarm()
    assert pending.done(), "it hangs"
    return pending.exception()


def main(trials: int, seed: int, folder: Path) -> None:
    logger, records = logging.getLogger("shardsave"), Records()
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    chance = random.Random(seed)
    net = torch.nn.Linear(600, 600, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    net.weight.grad = torch.zeros_like(net.weight)
    (folder / "file").touch()
    outcomes: Counter[str] = Counter()
    with torch.no_grad():
        net.weight.fill_(-1)
    shardsave.save_async(net, folder / "ckpt", training={"optimizer": optimizer}).wait().wait_cleaned()
    before, old = held(), -1.0
    for number in range(trials):
        with torch.no_grad():
            net.weight.fill_(number)
        error = trial(number, folder, chance, net, optimizer)
        where = (seed, number, error)
        now = value_in(folder / "ckpt")
        uncertain = isinstance(error, shardsave.DurabilityUncertainError)
        assert now == (number if error is None else old) or (uncertain and now in (old, number)), where
        assert now is not None
        old = now
        assert hooks() == 0, where
        assert_nothing_is_left(folder / "none")
        assert nothing_leaked(before), where
        outcomes["committed" if error is None else type(error).__name__] += 1
    shardsave.save_async(net, folder / "ckpt").wait().wait_cleaned()
    assert_nothing_is_left(folder / "ckpt")
    failed = sum(count for name, count in outcomes.items() if name not in ("committed", "SaveCancelledError"))
    assert (
        records.events["background save failed"] == failed
        and records.events["save cancelled"] == outcomes["SaveCancelledError"]
    )
    assert take_failures() == ()
    print(dict(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    os.sys.stdout.flush()
