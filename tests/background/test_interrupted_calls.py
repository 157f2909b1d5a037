"""Method: Ctrl-C comes before every line that `save_async` runs on the thread of its caller to stage and to launch the save."""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import shardsave
from background.held import assert_nothing_is_left, value_in
from background.saving import hooks
from shardsave._background.failures import take_failures
from shardsave._background.flight import Flight
from support import ROOT

#: The files whose lines are met. Of a thread that is being started, only the beginnings of functions.
FILES = tuple(
    f"{ROOT}/src/shardsave/{name}"
    for name in ("_background/", "_api/background.py", "_api/save_async.py", "_api/pending_save.py", "_common/shutdown.py")
)

pytestmark = pytest.mark.timeout(60)

#: Every how many lines a trial is made.
STEP = 5


def is_with(frame: FrameType) -> bool:
    """Whether the line begins or ends a `with` block. Before the end of one, Python 3.11 handles no signal: its lock would stay locked."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def interrupted(call: Callable[[], shardsave.PendingSave], line: int) -> bool:
    """Calls ``call``, and interrupts it before its ``line``-th line. Returns whether it has so many."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        path = frame.f_code.co_filename
        if (event == "line" and path.startswith(FILES) and not is_with(frame)) or (
            event == "call" and path == threading.__file__
        ):
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        pending = call()
        sys.settrace(None)
        pending.wait()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count >= line


def interrupt_every_line(folder: Path, staging: Any) -> None:
    """Interrupts one call after the other, each some lines later, and looks after each whether anything is left of it."""
    net = torch.nn.Linear(600, 600)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    training = {"optimizer": optimizer}
    options: dict[str, Any] = {"staging": staging, "training": training, "if_busy": "raise"}
    shardsave.save_async(net, folder / "ckpt", **options).wait()
    line = 1
    while interrupted(lambda: shardsave.save_async(net, folder / "ckpt", durable=False, **options), line):
        assert_nothing_is_left(folder / "ckpt")
        assert hooks() == 0, line
        line += STEP
    assert line > 100, line
    report = shardsave.save_async(net, folder / "ckpt", **options).wait()
    assert report.staging == staging and value_in(folder / "ckpt") == 1 and take_failures() == ()


@pytest.mark.slow
@pytest.mark.parametrize("staging", ["snapshot", "ring"])
def test_an_interrupt_at_any_line(memory: Path, staging: str) -> None:
    """Catches a call that Ctrl-C ends, and after which its save goes on, keeps the turn, the lock, the hook, or a thread."""
    # Late in a process that has run thousands of tests, Python has traced no line any more. Why is not known: after torch's compiler has
    # been imported and used, with an audit hook, and after all tests were imported, it still traces.
    call = f"import pathlib, background.{Path(__file__).stem} as t; t.interrupt_every_line(pathlib.Path({str(memory)!r}), {staging!r})"
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "src")))
    subprocess.run([sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.mark.parametrize("then", ["a step", "a save"])
@pytest.mark.parametrize("method", ["abandon", "_abandon"])
def test_a_second_interrupt(memory: Path, monkeypatch: pytest.MonkeyPatch, method: str, then: str) -> None:
    """Catches a save that a second Ctrl-C has left behind: steps would wait for it, and each later save, and the end of the process."""
    net = torch.nn.Linear(600, 600)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    original, interrupts = getattr(Flight, method), []

    def interrupt(flight: Flight[Any], *arguments: Any) -> None:
        raise KeyboardInterrupt

    def interrupt_once(flight: Flight[Any]) -> None:
        if not interrupts:
            interrupts.append(None)
            raise KeyboardInterrupt
        original(flight)

    with monkeypatch.context() as patch:
        patch.setattr(Flight, "launch", interrupt)
        patch.setattr(Flight, method, interrupt_once)
        with pytest.raises(KeyboardInterrupt):
            shardsave.save_async(net, memory / "ckpt", training={"optimizer": optimizer}, staging="ring", durable=False)
    assert interrupts and hooks() == (method == "abandon")
    if then == "a step":
        started = time.monotonic()
        optimizer.step()
        assert time.monotonic() - started < 10
        assert_nothing_is_left(memory / "ckpt")
    shardsave.save_async(net, memory / "ckpt", if_busy="raise", durable=False).wait()
    assert_nothing_is_left(memory / "ckpt")
    assert hooks() == 0
