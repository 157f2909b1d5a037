"""Savers that are really killed, at the places where they leave the most behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shardsave
from faults.savers import KIND, save, state
from shardsave._storage.transaction import Transaction
from support import forked


def die(*ignored: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(folder: Path) -> None:
    shardsave.save(state(2), folder, max_shard_size=5000, progress=die)


def die_before_the_commit(folder: Path) -> None:
    Transaction._publish = die  # type: ignore[method-assign]
    save(2, folder)


def die_after_the_commit(folder: Path, kind: str = KIND) -> None:
    Transaction._clean = die  # type: ignore[method-assign]
    save(2, folder, kind=kind)


def killed(folder: Path, dying: Callable[[Path], None]) -> None:
    os.waitpid(forked(lambda: dying(folder)), 0)
