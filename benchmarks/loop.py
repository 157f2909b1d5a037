"""Runs a training loop and saves from it in one way, in this process alone. The last line of the output is JSON.

    python loop.py WAY DIRECTORY SIZE [--device cuda] [--steps 20] [--saves 3] [--check]

SIZE is the size of the model and its optimizer's state together, in bytes. The loop trains on one thread: so many steps without a save
before and after each save, and as many from the call on, or more, until the save is finished. The difference is the training that the
save has cost; it is counted until two steps after the save is finished, since longer windows add nothing but noise. The first save is
told apart, because it takes memory and starts processes that the next ones use again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

import measure
import model as models
from rivals.background import WAYS, Saver

SETTLE_SECONDS = 0.5
WARM_STEPS = 5
SHOWN_BEFORE = 3  # how many of the steps before a call a picture can show
LEAST_STEPS = 5  # from a call on; so many and AFTERWARDS after the end of the save are counted
AFTERWARDS = 2
SMALL = 1 << 20  # a tensor with fewer bytes is always copied in the call

Step = tuple[float, float]


class Loop:
    """A training loop. ``children_peak``: the most memory of child processes at the end of any step since `forget_peak`."""

    def __init__(self, training: models.LiveTraining, saver: Saver) -> None:
        self.children_peak = 0
        self._training = training
        self._saver = saver

    def step(self) -> Step:
        """Trains one step; returns its begin and its end."""
        began = time.perf_counter()
        self._training.step(self._saver.guard())
        self.children_peak = max(self.children_peak, measure.children_bytes())
        return began, time.perf_counter()

    def steps(self, number: int) -> list[Step]:
        return [self.step() for _ in range(number)]

    def forget_peak(self) -> None:
        self.children_peak = 0


class Moment:
    """Waits for something on a thread, which exists already when `begin` is called, so that the training does not wait for its start.

    ``at``: the time at which it came, as `time.perf_counter` counts; None before.
    """

    def __init__(self, wait: Callable[[Any], Any]) -> None:
        self.at: float | None = None
        self._wait = wait
        self._pending: SimpleQueue[Any] = SimpleQueue()
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def begin(self, pending: Any) -> None:
        self._pending.put(pending)

    def _run(self) -> None:
        try:
            self._result = self._wait(self._pending.get())
        except BaseException as error:  # raised again by `result`
            self._error = error
        self.at = time.perf_counter()

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


class Copies:
    """What copying the training's tensors takes: torch's ``copy_`` on one thread, into memory that was touched before."""

    def __init__(self, training: models.LiveTraining) -> None:
        tensors = [tensor.detach() for tensor in training.state_dict().values()]
        copies = _memory(tensors, pinned=training.device == "cuda")
        self._copy(copies, tensors)
        self.seconds = min(self._copy(copies, tensors) for _ in range(2))
        self.tensors = len(tensors)
        small = [index for index, tensor in enumerate(tensors) if tensor.nbytes < SMALL]
        self.small_bytes = sum(tensors[index].nbytes for index in small)
        self.small_seconds = min(self._copy([copies[i] for i in small], [tensors[i] for i in small]) for _ in range(2))

    def _copy(self, copies: list[torch.Tensor], tensors: list[torch.Tensor]) -> float:
        began = time.perf_counter()
        for copy, tensor in zip(copies, tensors):
            copy.copy_(tensor)
        return time.perf_counter() - began


def _memory(tensors: list[torch.Tensor], *, pinned: bool) -> list[torch.Tensor]:
    """New host memory for copies of ``tensors``: one mapping, of which nothing stays behind in the allocator."""
    if pinned:
        return [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    memory = torch.frombuffer(mmap.mmap(-1, sum(tensor.nbytes for tensor in tensors)), dtype=torch.float32)
    return [part.view(tensor.shape) for part, tensor in zip(memory.split([t.numel() for t in tensors]), tensors)]


def measured_save(loop: Loop, saver: Saver, path: Path, steps: int, base: int) -> tuple[dict[str, Any], float, Any]:
    """One save to the empty directory ``path`` with the steps from its call on: its figures, the time of the call, and shardsave's report.

    ``base``: the peak memory of the training alone.
    """
    staged, finished = Moment(saver.wait_staged), Moment(saver.wait)
    loop.forget_peak()
    measure.forget_peak()
    family, own = measure.family_seconds(), time.thread_time()
    called = time.perf_counter()
    pending = saver.start(path)
    returned, in_call = time.perf_counter(), time.thread_time() - own
    staged.begin(pending)
    finished.begin(pending)
    during: list[Step] = []
    counted = 0
    while len(during) < steps or not counted:
        during.append(loop.step())
        if finished.at is not None and not counted:
            counted = max(LEAST_STEPS, len(during) + AFTERWARDS)
    during += loop.steps(counted - len(during))
    report = finished.result()
    staged.result()
    own_during = time.thread_time() - own - in_call
    figures = {
        "stall": returned - called,
        "staged": (max(staged.at or 0, returned) if saver.stages_later else returned) - called,
        "finished": (max(finished.at or 0, returned) if saver.finishes_later else returned) - called,
        "counted": counted,
        "total": during[counted - 1][1] - called,
        "cpu_call": in_call,
        "cpu_background": max(0.0, measure.family_seconds() - family - in_call - own_during),
        "peak_extra": measure.peak_bytes() - base + loop.children_peak,
        "steps": [[began - called, ended - called] for began, ended in during],
    }
    return figures, called, report


def measure_saves(loop: Loop, saver: Saver, training: models.LiveTraining, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All saves, each with the steps before and after it that no save disturbs."""
    saves: list[dict[str, Any]] = []
    quiet = []
    base = 0  # the peak memory of steps before any save
    for number in range(options.saves + 1):
        copies = _settle(options.path, training)
        path = options.path / f"save-{number}"
        path.mkdir(parents=True)
        gc.collect()
        measure.forget_peak()
        quiet.append(loop.steps(options.steps))
        base = base or measure.peak_bytes()
        if number == options.saves:
            break
        save, called, report = measured_save(loop, saver, path, options.steps, base)
        before = [[began - called, ended - called] for began, ended in quiet[-1][-SHOWN_BEFORE:]]
        saves.append(save | {"before": before} | _staging(report, copies))
    for save, (before_it, after_it) in zip(saves, itertools.pairwise(quiet)):
        step = (_seconds(before_it) + _seconds(after_it)) / 2
        save |= {"step": step, "lost": save["total"] - step * save["counted"]}
    return saves


def _staging(report: Any, copies: Copies) -> dict[str, float]:
    """The staging memory of shardsave, what it copied in the call, and what copying the same takes without it."""
    ring = getattr(report, "staging_bytes", 0)
    copied = {"copied": copies.small_bytes, "memcpy_copied": copies.small_seconds}
    return {"memcpy": copies.seconds, "tensors": copies.tensors, "ring": ring, **copied}


def _settle(path: Path, training: models.LiveTraining) -> Copies:
    """Removes what was saved, lets the disk come to rest, and makes the host of a virtual machine provide free memory."""
    shutil.rmtree(path, ignore_errors=True)
    measure.touch_free_memory(models.tensor_bytes(training) * 5 // 4)
    copies = Copies(training)
    os.sync()
    time.sleep(SETTLE_SECONDS)
    return copies


def _seconds(steps: list[Step]) -> float:
    """The mean length of a step, with what lies between the steps."""
    return (steps[-1][1] - steps[0][0]) / len(steps)


def check(saver: Saver, training: models.LiveTraining, path: Path, size: int) -> None:
    """Raises unless a save beside steps of the optimizer, the first right after the call, is the state at the call, bit for bit."""
    expected = {name: tensor.detach().clone() for name, tensor in training.state_dict().items()}
    path.mkdir(parents=True, exist_ok=True)
    pending = saver.start(path)
    for _ in range(3):
        training.update(saver.guard())
    saver.wait(pending)
    loaded = models.LiveTraining(size, seed=1, device=training.device)
    saver.load(loaded, path)
    if not models.same(loaded, expected):
        raise RuntimeError("the checkpoint is not the state at the moment of the call")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("path", type=Path, metavar="DIRECTORY", help="is removed before each save")
    parser.add_argument("size", type=int, help="bytes of the model and its optimizer's state")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="also compare the content of one more save")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    training = models.LiveTraining(options.size, device=options.device)
    saver = WAYS[options.way](training)
    loop = Loop(training, saver)
    loop.steps(WARM_STEPS)
    Copies(training)  # the first use of this code is no part of the training's memory
    gc.collect()
    saves = measure_saves(loop, saver, training, options)
    if options.check and type(saver) is not Saver:
        check(saver, training, options.path / "checked", options.size)
    saver.close()
    shutil.rmtree(options.path, ignore_errors=True)
    result = {
        "bytes": models.tensor_bytes(training),
        "tensors": len(training.state_dict()),
        "durable": saver.durable,
        "keeps": saver.memory,
        "wall": time.perf_counter() - began,
        "saves": saves,
    }
    sys.stdout.flush()
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
