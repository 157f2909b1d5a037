"""What the programs of `background.programs` begin with: it is imported once, saves once, and has what all of them use.

A program gets all names of this module.
"""

import atexit  # noqa: F401
import multiprocessing  # noqa: F401
import os
import signal
import sys
import tempfile
import threading  # noqa: F401
import time

import torch

import shardsave

signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # OpenMP does not survive a fork
with tempfile.TemporaryDirectory() as _run:
    with shardsave.CheckpointManager(_run, save_every=1, asynchronous=True, keep_last=1) as _manager:
        for _step in (1, 2):
            _manager.step(_step, {"x": torch.ones(2)}, training={"y": _step})


def full(value: float, size: int = 8) -> dict[str, torch.Tensor]:
    """A state of one tensor."""
    return {"x": torch.full((size,), float(value))}


def hold(done: int, total: int) -> None:
    """For `progress`: waits until the test lets the save go on."""
    say("held")
    while not os.path.exists(f"{sys.argv[1]}/go"):
        time.sleep(0.002)


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")
