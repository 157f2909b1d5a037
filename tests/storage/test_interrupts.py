"""Method: real processes are interrupted, terminated or forked while they save or load; the time until they end is measured.

The limit is the promised second, with some slack for a busy machine.
"""

from __future__ import annotations

import os
import random
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import shardsave
from shardsave._storage.transaction import Transaction
from warm_python import Running, warm_python

INDEX = "model.safetensors.index.json"
PROMISED, SLACK = 1.0, 2.0

pytestmark = [pytest.mark.alone, pytest.mark.timeout(120)]


def process(program: str, folder: Path, **environment: str) -> Running:
    """Starts Python on ``program``, which can use torch, shardsave and ``folder``; its output can be read."""
    preamble = "import os, signal, sys, threading, time, torch, shardsave\nfolder = sys.argv[1]\n"
    return warm_python().start(["-c", preamble + textwrap.dedent(program), folder], **environment)


def generation_in(folder: Path) -> int:
    """The generation of the checkpoint in ``folder``, which must be whole."""
    found = shardsave.load(folder)["x"]
    assert (found == found[0]).all()
    return int(found[0])


CTRL_C = """
def generation(n):
    strided = torch.full((2000, 3000), n, dtype=torch.uint8).t()
    return {"x": torch.full((megabytes * 1_000_000,), n, dtype=torch.uint8), "s": strided}

megabytes = 20 if os.environ["SHARDSAVE_ENGINE"] == "portable" else 200
old, new = generation(1), generation(2)
shardsave.save(old, folder)
sent = []

def send():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

for verb in (lambda: shardsave.save(new, folder), lambda: shardsave.load(folder), lambda: shardsave.verify(folder)):
    for delay in (0.03, 0.25):
        threading.Timer(delay, send).start()
        try:
            while True:
                verb()
        except KeyboardInterrupt:
            print(time.monotonic() - sent[-1])
        found = shardsave.load(folder)
        assert (found["x"] == found["s"][0, 0]).all() and (found["s"] == found["s"][0, 0]).all()

shardsave.save(old, folder)
assert not [name for name in os.listdir(folder) if name.startswith(".shardsave")]
"""


@pytest.mark.parametrize("engine", ["native", "portable"])
def test_ctrl_c_ends_within_a_second(tmp_path: Path, engine: str) -> None:
    """Catches a save, load or verification that goes on after Ctrl-C, leaves half a checkpoint behind, or breaks the next call."""
    running = process(CTRL_C, tmp_path, SHARDSAVE_ENGINE=engine)
    assert running.wait() == 0, running.error
    waited = [float(line) for line in running.out.split()]
    assert len(waited) == 6 and max(waited) < PROMISED + SLACK, waited


def test_terminated(tmp_path: Path) -> None:
    """SIGTERM has its default handling: the process ends at once. Catches anything else afterwards than the old or new checkpoint."""
    program = """
        tensors = [{"x": torch.full((20_000_000,), n, dtype=torch.uint8)} for n in (1, 2)]
        shardsave.save(tensors[0], folder)
        print("ready", flush=True)
        while True:
            shardsave.save(tensors[1], folder)
            shardsave.save(tensors[0], folder)
    """
    chance = random.Random(7)
    for _ in range(2):
        running = process(program, tmp_path)
        while running.out != "ready\n":
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        began = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait() == -signal.SIGTERM and time.monotonic() - began < PROMISED + SLACK
        assert generation_in(tmp_path) in (1, 2)
    shardsave.save({"x": torch.full((3,), 3)}, tmp_path)
    assert set(os.listdir(tmp_path)) == {INDEX, "model-00001-of-00001.safetensors"} or len(os.listdir(tmp_path)) == 2


ENDING = """
kept = []
tensors = {"x": torch.full((60_000_000,), 1, dtype=torch.uint8), "s": torch.zeros(1000, 2000).t()}
shardsave.save(tensors, folder)
begun = threading.Event()

def saving():
    begun.set()
    while True:
        shardsave.save(tensors, folder)
        if not DAEMON:
            return

def loading():
    begun.set()
    while True:
        kept.append(shardsave.load(folder))
        if not DAEMON:
            return

threading.Thread(target=VERB, daemon=DAEMON).start()
begun.wait()
time.sleep(DELAY)
print("main has ended", flush=True)
"""


@pytest.mark.parametrize(("engine", "daemon"), [("native", True), ("portable", True), ("native", False)])
def test_the_interpreter_ends_while_a_thread_works(tmp_path: Path, engine: str, daemon: bool) -> None:
    """Catches a process that hangs or aborts at its end, because a thread returns to an interpreter that is gone."""
    running = []
    for number, verb in enumerate(("saving", "loading")):
        program = ENDING.replace("DAEMON", str(daemon)).replace("VERB", verb).replace("DELAY", str(0.03 + 0.05 * number))
        running.append(process(program, tmp_path / verb, SHARDSAVE_ENGINE=engine))
    for each in running:
        code = each.wait()
        assert (code, each.out, each.error) == (0, "main has ended\n", "")
    for verb in ("saving", "loading"):
        assert generation_in(tmp_path / verb) == 1
        assert not [name for name in os.listdir(tmp_path / verb) if name.startswith(".shardsave")]


def test_the_interpreter_ends_while_a_thread_waits_for_the_lock(tmp_path: Path) -> None:
    """Catches an interpreter exit that waits for a daemon thread, which waits for a saver that does not end."""
    program = """
        waits = threading.Event()
        real = time.sleep

        def sleep(seconds):
            waits.set()
            real(seconds)

        time.sleep = sleep
        threading.Thread(target=lambda: shardsave.save({"x": torch.ones(1)}, folder), daemon=True).start()
        waits.wait()
        print(time.time(), flush=True)
    """
    with Transaction(tmp_path, durable=False, lock_timeout=1):
        running = process(program, tmp_path)
        running.wait()
        ended = time.time()
    assert running.error == "" and ended - float(running.out) < PROMISED + SLACK


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_during_a_save_saves_elsewhere(tmp_path: Path) -> None:
    """Catches a child that hangs on its parent's locks, writes into its staging memory, or cannot save at all."""
    stop = threading.Event()
    saves = []
    state = {"x": torch.full((30_000_000,), 1, dtype=torch.uint8), "s": torch.ones(500, 1000).t()}
    other = {"x": torch.full((9_000_000,), 2, dtype=torch.uint8), "s": torch.ones(500, 1000).t()}

    def parent() -> None:
        while not stop.is_set():
            saves.append(shardsave.save(state, tmp_path / "parent"))

    thread = threading.Thread(target=parent)
    thread.start()
    try:
        while not saves:
            time.sleep(0.01)
        for number in range(6):
            time.sleep(0.013 * number)
            child = os.fork()
            if child == 0:
                try:  # no torch here beyond our own: OpenMP does not survive a fork
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(30)
                    shardsave.save(other, tmp_path / f"child{number}")
                    os._exit(0)
                except BaseException:
                    os._exit(2)
            assert os.waitpid(child, 0)[1] == 0
            assert generation_in(tmp_path / f"child{number}") == 2
    finally:
        stop.set()
        thread.join()
    assert generation_in(tmp_path / "parent") == 1 and len(os.listdir(tmp_path / "parent")) == 2
