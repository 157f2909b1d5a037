"""Saves in the background that are held back, and what they leave behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardsave
from shardsave._background import turns
from support import is_locked


def model(value: float = 0.0, size: int = 8) -> nn.Linear:
    layer = nn.Linear(size, size)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def value_in(folder: Path) -> float | None:
    """The one value of all weights in ``folder``, which are whole; None if there is no checkpoint."""
    try:
        tensors = shardsave.load(folder, progress=False).values()  # compares checksums
    except shardsave.CheckpointNotFoundError:
        return None
    values = {float(limit) for tensor in tensors for limit in (tensor.min(), tensor.max())}
    assert len(values) == 1, values
    return values.pop()


class Held:
    """A function for ``progress``: it holds the saving thread before the commit, until ``go`` is set."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, done: int, total: int) -> None:
        self.reached.set()
        assert self.go.wait(60), "nobody has let the save go on"


@contextmanager
def held_save(source: Any, folder: Path, **options: Any) -> Iterator[tuple[shardsave.PendingSave, Held]]:
    """A save that is held back before its commit, at the latest until the end of the block."""
    held = Held()
    pending = shardsave.save_async(source, folder, **{"durable": False, "progress": held, **options})
    try:
        assert held.reached.wait(30)
        yield pending, held
    finally:
        held.go.set()
        pending._flight.wait_ended(60)


def assert_nothing_is_left(folder: Path) -> None:
    """No save is in flight; no thread of one, no lock on ``folder`` and no staging directory is left."""
    deadline = time.monotonic() + 5
    while [
        thread for thread in threading.enumerate() if thread.name == "shardsave" and thread.ident
    ] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert turns.in_flight() is None
    assert [thread for thread in threading.enumerate() if thread.name == "shardsave" and thread.ident] == []
    if folder.exists():
        assert not is_locked(folder)
        assert [name for name in os.listdir(folder) if name.startswith(".shardsave")] == []
