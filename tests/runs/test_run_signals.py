"""Signals that ask for a last save. Method: real signals, in forked processes that train; what each says is its story."""

from __future__ import annotations

import logging
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

import shardsave

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def story(program: str, folder: Path) -> tuple[int, list[str]]:
    """The exit code of a forked process that runs ``program`` (negative: the signal that ended it), and the words that it said."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write_end, 2)
        os.close(write_end)
        try:
            manager = shardsave.CheckpointManager(folder, save_every=10, durable=False, progress=False)
            names = {"manager": manager, "send": send, "state": {"x": torch.ones(3)}}
            names |= {module.__name__: module for module in (logging, os, signal, time, torch, shardsave)}
            exec(
                textwrap.dedent(program), names | {"say": lambda *words: os.write(2, f"{' '.join(map(str, words))}\n".encode())}
            )
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end) as said:
        words = said.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), words


def steps_in(folder: Path) -> list[int]:
    return [info.step for info in shardsave.CheckpointManager(folder, save_every=None).steps() if info.committed]


def test_a_last_save(memory: Path) -> None:
    """Catches a signal that ends the training before it is saved, a last save that comes twice or never, and handlers that stay."""
    program = """
    with manager:
        manager.save_on_signal(signal.SIGTERM, signal.SIGUSR1)
        for step in range(1, 100):
            if step == 13:
                send()
                say("sent", manager.preempted)
            if manager.step(step, state):
                say("saved", step)
            if manager.preempted:
                break
        say(manager.step(step + 1, state))
    say(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL)
    """
    code, words = story(program, memory)
    assert (code, words) == (0, ["saved", "10", "sent", "False", "saved", "13", "None", "True", "True"])
    assert steps_in(memory) == [10, 13]


def test_a_signal_during_a_save(memory: Path) -> None:
    """Catches a save that a signal breaks off, and a last save that does not come because one was at work."""
    program = """
    sent = []
    def once(done, total):
        if not sent:
            sent.append(send())
    manager.save_on_signal()
    say(manager.step(10, state, progress=once).tensors, manager.preempted)
    manager.step(11, state)
    say(manager.preempted)
    manager.close()
    """
    assert story(program, memory) == (0, ["1", "False", "True"]) and steps_in(memory) == [10, 11]


def test_a_signal_after_the_last_step(memory: Path) -> None:
    """Catches a save at the end of the training that does not count as the last one, and a signal after which nothing was saved and
    nobody says so, or says so twice.
    """
    program = """
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelname == "WARNING" and say("WARNING", record.shardsave["event"]))
    logging.getLogger("shardsave").addHandler(handler)
    for number in (1, 2):
        manager = shardsave.CheckpointManager(manager._shown, save_every=10, durable=False, progress=False)
        manager.save_on_signal()
        manager.step(number, state)
        send()
        if number == 1:
            manager.save(1, state)
        say(manager.preempted)
        manager.close()
        manager.close()
    """
    said = ["True", "False", "WARNING", "signal", "without", "a", "save"]
    assert story(program, memory) == (0, said) and steps_in(memory) == [1]


def test_a_second_signal(memory: Path) -> None:
    """Catches a process that cannot be ended because each signal only asks for a save."""
    program = """
    manager.save_on_signal()
    send()
    say("alive")
    send()
    say("alive still")
    """
    assert story(program, memory) == (-signal.SIGTERM, ["alive"])


def test_a_second_signal_for_a_handler(memory: Path) -> None:
    """Catches a second signal that does not reach the program's own handler."""
    program = """
    signal.signal(signal.SIGTERM, lambda number, frame: say("own", number == signal.SIGTERM))
    manager.save_on_signal()
    send()
    say("first")
    send()
    manager.step(1, state)
    say(manager.preempted)
    """
    assert story(program, memory) == (0, ["first", "own", "True", "True"])


def test_ctrl_c(memory: Path) -> None:
    """Catches a second Ctrl-C that is no KeyboardInterrupt, and one that the first save swallows."""
    program = """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    manager.save_on_signal(signal.SIGINT)
    send(signal.SIGINT)
    say("first")
    try:
        send(signal.SIGINT)
    except KeyboardInterrupt:
        say("interrupted")
    """
    assert story(program, memory) == (0, ["first", "interrupted"])


def test_ignored_signals_and_later_handlers(memory: Path) -> None:
    """Catches a handler of someone else that is replaced at the end, and one that calls ours and waits for what it did before."""
    program = """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    manager.save_on_signal(signal.SIGUSR1, signal.SIGUSR2)
    ours = signal.getsignal(signal.SIGUSR2)
    def later(number, frame):
        say("later")
        ours(number, frame)
    signal.signal(signal.SIGUSR2, later)
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    send(signal.SIGUSR2)
    say("alive")
    manager.close()
    say(signal.getsignal(signal.SIGUSR2) is later, signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN)
    send(signal.SIGUSR2)
    """
    code, words = story(program, memory)
    assert (code, words) == (-signal.SIGUSR2, ["later", "alive", "True", "True", "later"])


def test_a_failed_last_save(memory: Path) -> None:
    """Catches a training that ends because the last save failed, and a request that is forgotten."""
    program = """
    manager.save_on_signal()
    send()
    try:
        manager.step(3, {"x": torch.zeros(1).expand(1 << 45)})
    except shardsave.OutOfSpaceError:
        say("full", manager.preempted)
    manager.step(4, state)
    say(manager.preempted)
    """
    assert story(program, memory) == (0, ["full", "False", "True"]) and steps_in(memory) == [4]


def test_a_forked_child(memory: Path) -> None:
    """Catches a worker process that a signal cannot end, because it inherits the handler; and one that asks its parent's manager."""
    program = """
    manager.save_on_signal()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, b"x")
        time.sleep(50)
        os._exit(0)
    os.read(read_end, 1)
    os.kill(child, signal.SIGTERM)
    say(os.waitpid(child, 0)[1])
    manager.step(1, state)
    say(manager.preempted)
    """
    assert story(program, memory) == (0, [str(int(signal.SIGTERM)), "False"]) and steps_in(memory) == []


@pytest.mark.parametrize("ignored", [True, False])
def test_a_signal_to_the_workers(memory: Path, ignored: bool) -> None:
    """Catches advice in docs/runs.md that does not help: a last save that does not come because the signal has ended a worker too."""
    program = f"""
    os.setsid()
    loader = torch.utils.data.DataLoader(
        range(40), num_workers=1,
        worker_init_fn=(lambda worker: signal.signal(signal.SIGTERM, signal.SIG_IGN)) if {ignored} else None,
    )
    with manager:
        manager.save_on_signal()
        for step, batch in enumerate(loader, 1):
            if step == 13:
                os.system(f"kill -TERM -{{os.getpid()}}")  # a worker obeys its parent without an error
                time.sleep(0.5)
            manager.step(step, state)
            if manager.preempted:
                break
    """
    code, words = story(program, memory)
    assert steps_in(memory) == ([10, 13] if ignored else [10])
    assert (code, words) == (0, []) if ignored else code == 1 and "Terminated" in " ".join(words)


def test_where_no_handler_can_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a handler that could not be put back, and a manager that is half installed on another thread than the main one."""
    manager = shardsave.CheckpointManager(tmp_path, save_every=1)
    before = signal.getsignal(signal.SIGUSR1)
    errors: list[str] = []

    def attempt() -> None:
        try:
            manager.save_on_signal(signal.SIGUSR1)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    attempt()
    monkeypatch.undo()
    assert len(errors) == 2 and "main thread" in errors[0] and "SIGUSR1 was not installed by Python" in errors[1]
    manager.close()
    assert signal.getsignal(signal.SIGUSR1) is before
