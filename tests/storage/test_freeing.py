"""The space of removed files is freed after a save has returned.

Method: the thread that frees it is halted, so that everything that a program may do meanwhile can be tried.
"""

from __future__ import annotations

import _thread
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardsave
from faults.dying import die_before_the_commit, killed
from faults.savers import generation_in, litter_in, state
from faults.scenarios import DELETED, held, is_unlocked, nothing_leaked
from shardsave._storage import freeing
from support import holds_in_child
from warm_python import warm_python

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has several threads when it forks

Halt = Callable[[], None]


def save(generation: int, folder: Path) -> shardsave.SaveReport:
    """Saves two shards."""
    return shardsave.save(state(generation), folder, max_shard_size=5000, durable=False, progress=False)


def files_in_use(folder: Path) -> list[str]:
    """The names of removed files in ``folder`` that this process keeps open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one that listed them
            continue
    return sorted(Path(link).name.removesuffix(DELETED) for link in links if link.startswith(str(folder)) and DELETED in link)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halt]:
    """Halts the thread that frees space, until the value of this fixture is called."""
    go_on = threading.Event()
    free = freeing._free

    def free_when_released(files: list[freeing.Descriptor]) -> None:
        go_on.wait(60)
        free(files)

    assert freeing.wait_until_freed(10)
    monkeypatch.setattr(freeing, "_free", free_when_released)
    yield go_on.set
    go_on.set()
    assert freeing.wait_until_freed(10)


def test_a_save_returns_before_old_shards_are_freed(memory: Path, release: Halt) -> None:
    """Catches an overwrite that takes longer the larger the old checkpoint is; and old names, a lock or space that stay in use."""
    save(1, memory)
    old = {name for name in os.listdir(memory) if name.endswith(".safetensors")}
    before = held()
    report = save(2, memory)
    assert set(report.removed) == old and not old & set(os.listdir(memory)) and not report.leftovers
    assert generation_in(memory) == 2 and not litter_in(memory) and is_unlocked(memory)
    assert files_in_use(memory) == sorted(old)
    assert not report.wait_cleaned(0) and not report.wait_cleaned(0.01)
    release()
    assert report.wait_cleaned() and report.wait_cleaned(0)
    assert not files_in_use(memory) and nothing_leaked(before)


def test_everything_large_that_a_save_removes(memory: Path, release: Halt) -> None:
    """Catches a save that waits until a lone file, or the shards of a killed save, are freed."""
    save_file(state(1), memory / "model.safetensors")
    killed(memory, die_before_the_commit)
    assert any(name.startswith(".shardsave-") for name in os.listdir(memory))
    report = save(3, memory)
    assert "model.safetensors" in files_in_use(memory) and len(files_in_use(memory)) >= 3
    assert generation_in(memory) == 3 and not litter_in(memory) and not report.leftovers
    release()
    assert report.wait_cleaned(10) and not files_in_use(memory)


def test_a_file_with_another_name_is_not_kept_open(memory: Path, release: Halt) -> None:
    """Catches a descriptor that is kept for nothing: for what still has a name, as removed files have on NFS."""
    save(1, memory / "ckpt")
    (memory / "backup").mkdir()
    for path in (memory / "ckpt").glob("*.safetensors"):
        os.link(path, memory / "backup" / path.name)
    report = save(2, memory / "ckpt")
    assert not files_in_use(memory) and report.wait_cleaned(0) and len(report.removed) == 2
    assert len(list((memory / "backup").iterdir())) == 2


VERBS: dict[str, Callable[[Path], object]] = {
    "save": lambda folder: save(3, folder / "next"),
    "convert": lambda folder: shardsave.convert(folder / "a", folder / "next.safetensors", to="safetensors", durable=False),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_next_save_waits(memory: Path, release: Halt, verb: str) -> None:
    """Catches a save that finds no room, or no quota, because the space of its predecessor's files is not free yet."""
    save(1, memory / "a")
    save(2, memory / "a")
    seen: list[Path] = []
    timer = threading.Timer(0.5, lambda: (seen.extend(memory.rglob("*")), release()))
    timer.start()
    VERBS[verb](memory)
    timer.join()
    assert not [path for path in seen if path.is_file() and path.parent != memory / "a"] and not files_in_use(memory)


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_during_the_wait(memory: Path, release: Halt, verb: str) -> None:
    """Catches a wait that Ctrl-C does not end, or that leaves a lock or files behind."""
    save(1, memory / "a")
    save(2, memory / "a")
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        VERBS[verb](memory)
        time.sleep(2)
    left = sorted(str(path.relative_to(memory)) for path in memory.rglob("*"))
    assert [name for name in left if not name.startswith("a")] == (["next"] if verb == "save" else []), left
    assert is_unlocked(memory / ("next" if verb == "save" else "a"))


def test_a_signal_handler_waits_too(memory: Path, release: Halt) -> None:
    """Catches a save in a signal handler that waits for ever, because the save that it interrupts waits."""
    save(1, memory / "a")
    save(2, memory / "a")
    inner: list[int] = []

    def handle(number: int, frame: object) -> None:
        threading.Timer(0.1, release).start()
        inner.append(save(4, memory / "handler").tensors)

    previous = signal.signal(signal.SIGUSR1, handle)
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        save(3, memory / "b")
        time.sleep(0 if inner else 1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert inner == [4] and generation_in(memory / "b") == 3 and generation_in(memory / "handler") == 4


def test_a_forked_child(memory: Path, release: Halt) -> None:
    """Catches a child that keeps removed files of its parent on the disk, or waits for a thread that it does not have."""
    save(1, memory / "a")
    report = save(2, memory / "a")
    assert files_in_use(memory)
    assert holds_in_child(lambda: not files_in_use(memory))
    assert holds_in_child(lambda: report.wait_cleaned(0))
    assert holds_in_child(lambda: save(1, memory / "b").tensors == 4)
    assert files_in_use(memory)


LEAVING = """
import sys, time, torch
from pathlib import Path
import shardsave
from shardsave._storage import freeing

def overwrite(folder):
    freeing._free = lambda files: time.sleep(60)
    for value in (1, 2):
        shardsave.save({"x": torch.full((1000,), float(value))}, folder, durable=False, progress=False)
    assert any(freeing._started)

if __name__ == "__main__":
    overwrite(sys.argv[1])
"""


def overwrite_and_leave(folder: Path) -> None:
    """As ``LEAVING``, in a process of multiprocessing, which runs no exit handlers."""
    freeing._free = lambda files: time.sleep(60)
    save(1, folder)
    save(2, folder)
    assert any(freeing._started)


def test_the_process_ends_before_the_thread(memory: Path) -> None:
    """Catches a process that does not end, or not well, because its thread still frees space; and one that leaves files behind."""
    started = time.monotonic()
    ended = warm_python().run(["-c", LEAVING, memory / "a"], action="error")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert shardsave.load(memory / "a")["x"][0] == 2 and not litter_in(memory / "a")
    process = multiprocessing.get_context("fork").Process(target=overwrite_and_leave, args=(memory / "b",))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and generation_in(memory / "b") == 2 and not litter_in(memory / "b")
    assert time.monotonic() - started < 50


def test_without_a_thread(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches space that stays in use, or a save that fails after its commit, because no thread can be started."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    save(1, memory)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    report = save(2, memory)
    assert not files_in_use(memory) and report.wait_cleaned(0) and generation_in(memory) == 2


def test_the_number_of_open_files_is_bounded(memory: Path, release: Halt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save of many shards that takes all descriptors of its process."""
    shardsave.save(state(1), memory, max_shard_size=1, durable=False)
    monkeypatch.setattr(freeing, "_MOST_FILES", 3)
    report = shardsave.save(state(2), memory, max_shard_size=1, durable=False)
    assert len(report.removed) == 4 and not report.leftovers and len(files_in_use(memory)) == 3
    release()
    assert report.wait_cleaned(10)
    monkeypatch.setattr(freeing, "descriptor_allowance", lambda: 1)
    report = shardsave.save(state(3), memory, max_shard_size=1, durable=False)
    assert report.wait_cleaned(10) and not litter_in(memory)


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_a_conversion_over_a_file(memory: Path, release: Halt, to: str) -> None:
    """Catches a conversion that waits until the file that it replaces is freed; a second name of it that stays; and one without a file at
    the path, as where an open file is renamed over on NFS."""
    save(1, memory / "source")
    target = memory / "out" / f"model.{to}"
    shardsave.convert(memory / "source", target, to=to, durable=False)
    old = os.stat(target).st_ino
    report = shardsave.convert(memory / "source", target, to=to, durable=False)
    assert os.listdir(target.parent) == [target.name] and os.stat(target).st_ino != old and report.removed == ()
    assert len(files_in_use(memory)) == 1 and not report.wait_cleaned(0)
    release()
    assert report.wait_cleaned(10) and not files_in_use(memory)


def test_a_conversion_whose_rename_fails(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second name of the old file that stays when it was not replaced, and an old file that goes."""
    save(1, memory / "source")
    target = memory / "out" / "model.safetensors"
    shardsave.convert(memory / "source", target, to="safetensors", durable=False)
    status = os.stat(target)

    def rename(*arguments: object, **options: object) -> None:
        assert os.stat(target).st_nlink == 2
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(shardsave.SaveNotCommittedError):
        shardsave.convert(memory / "source", target, to="safetensors", durable=False)
    assert os.listdir(target.parent) == [target.name] and os.stat(target).st_ino == status.st_ino
    assert os.stat(target).st_nlink == 1 and not files_in_use(memory)


def test_reports_are_values(memory: Path, release: Halt) -> None:
    """Catches a report that holds a thread: one that cannot be pickled, compared, or written as JSON."""
    save(1, memory)
    report = save(2, memory)
    copy = pickle.loads(pickle.dumps(report))
    assert copy == report and not copy.wait_cleaned(0) and asdict(report).keys() == {field.name for field in fields(report)}
    for wrong in ("1", True, -1, float("nan")):
        with pytest.raises((TypeError, ValueError), match="timeout must be"):
            report.wait_cleaned(wrong)  # type: ignore[arg-type]
    assert torch.equal(shardsave.load(memory)["t0"], state(2)["t0"])
