"""A training that saves again and again keeps nothing of the saves before the last one: neither memory nor descriptors nor threads."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import torch
from torch import nn

import shardsave


def in_use() -> tuple[int, int, int]:
    """Resident bytes, open descriptors and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_saves_leave_nothing_in_memory(memory: Path) -> None:
    """Catches what each save keeps: of 500 saves each added a few hundred bytes, and twenty kilobytes each would be found here."""
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    for parameter in list(net.parameters())[:12]:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad])
    net(torch.ones(2, 64)).sum().backward()
    saves, warm = 60, 20
    for number in range(saves):
        if number == warm:
            before = in_use()
        pending = shardsave.save_async(
            net,
            memory / str(number),
            training={"optimizer": optimizer},
            staging="snapshot",
            reuse=memory / str(number - 1) if number else None,
        )
        optimizer.step()
        assert bool(pending.wait().bytes_reused) == (number > 0)
        del pending
        shutil.rmtree(memory / str(number - 1), ignore_errors=True)
    resident, descriptors, threads = in_use()
    assert resident - before[0] < (saves - warm) * 20_000
    assert descriptors <= before[1] and threads <= before[2]
