"""Method: Ctrl-C comes at the beginning of every function that ends a save, a cleaning or a conversion, before its first line has run.

The program keeps the exception, as an interactive session does, and with it every object of the interrupted call.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import shardsave
from shardsave._common import gc_pause
from support import is_locked

STATE = {"x": torch.ones(2)}

VERBS: dict[str, Callable[[Path], object]] = {
    "save": lambda folder: shardsave.save(STATE, folder / "ckpt", durable=False, lock_timeout=0),
    "clean": lambda folder: shardsave.clean(folder / "ckpt", lock_timeout=0),
    "convert": lambda folder: shardsave.convert(folder / "source", folder / "file", to="safetensors", durable=False),
}
CLOSING = {"close", "abandon", "__exit__", "__del__", "callback", "_exit_wrapper"}


def interrupted(action: Callable[[], object], beginning: int) -> tuple[bool, BaseException | None]:
    """Whether ``action`` called so many closing functions; and the error with which it ended, after an interrupt in the last of them."""
    calls = 0

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        path = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name in CLOSING and ("/shardsave/" in path or path.endswith("contextlib.py")):
            calls += 1
            if calls == beginning:
                sys.settrace(None)
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt as error:
        return True, error
    finally:
        sys.settrace(None)
    return calls >= beginning, None  # Python ignores an interrupt in `__del__`


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_no_lock_outlives_an_interrupt(verb: str, memory: Path) -> None:
    """Catches a lock that is held for the life of the process, or as long as the exception is kept; and files that stay behind."""
    for name in ("source", "ckpt"):
        shardsave.save(STATE, memory / name, durable=False)
    VERBS[verb](memory)
    beginning, kept = 1, []
    while True:
        reached, error = interrupted(lambda: VERBS[verb](memory), beginning)
        if not reached:
            break
        kept.append(error)
        assert not is_locked(memory / "ckpt"), beginning
        VERBS[verb](memory)
        assert not [name for name in os.listdir(memory) if name.endswith(".part")], beginning
        beginning += 1
    assert beginning > 10 and gc.isenabled()


def test_an_interrupt_while_the_collector_is_paused() -> None:
    """Catches another error in the place of the interrupt, and a collector that stays off."""
    lines, first = inspect.getsourcelines(gc_pause.gc_paused.__wrapped__)
    source = [line.strip() for line in lines]

    def block() -> None:
        with gc_pause.gc_paused():
            pass

    for line in range(first + source.index("try:") + 1, first + source.index("finally:")):

        def trace(frame: FrameType, event: str, argument: Any, line: int = line) -> Any:
            if event == "line" and frame.f_lineno == line and frame.f_code.co_name == "gc_paused":
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                block()
        finally:
            sys.settrace(None)
        assert gc.isenabled() and not gc_pause._paused


def test_no_finaliser_of_a_closed_file_runs(tmp_path: Path) -> None:
    """Catches Ctrl-C that gets lost: Python ignores an interrupt in the `__del__` of a file of ours that was closed long before."""
    shardsave.save({"x": torch.ones(3)}, tmp_path / "x", durable=False)
    finalisers: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "__del__" and "shardsave" in frame.f_code.co_filename:
            finalisers.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        shardsave.save({"x": torch.ones(3)}, tmp_path / "x")
        shardsave.load(tmp_path / "x")
        shardsave.verify(tmp_path / "x")
        shardsave.convert(tmp_path / "x", tmp_path / "x.pt", to="torch", dtype="bfloat16")
        shardsave.convert(tmp_path / "x.pt", tmp_path / "y")
    finally:
        sys.setprofile(None)
    assert not finalisers
