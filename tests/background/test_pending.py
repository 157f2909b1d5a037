"""`save_async` and `PendingSave`: what they return and raise, when, and to whom."""

from __future__ import annotations

import _thread
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardsave
from background.held import assert_nothing_is_left, held_save, model, value_in
from shardsave._background.failures import take_failures
from shardsave._common import backend
from shardsave._storage.cleanup import Cleaner
from shardsave._storage.transaction import Transaction
from warm_python import warm_python


@pytest.fixture(autouse=True)
def told(memory: Path) -> Iterator[None]:
    """Catches a save that is still in flight after its test; what failed is not told to the next test."""
    yield
    assert_nothing_is_left(memory / "ckpt")
    take_failures()


def test_a_save(memory: Path) -> None:
    """Catches a save of another moment than that of the call, one that returns too late, and a report that lacks what it took."""
    net = model(1, size=2000)
    with held_save(net, memory / "ckpt", staging="snapshot", step=7) as (pending, held):
        assert not pending.done() and pending.exception() is None and pending.staged.is_set() and "running" in repr(pending)
        with torch.no_grad():
            net.weight.fill_(2)
        assert value_in(memory / "ckpt") is None
        time.sleep(0.02)
        held.go.set()
        report = pending.wait()
    assert (
        pending.done()
        and pending.exception() is None
        and pending.wait() is report
        and pending.path == os.fspath(memory / "ckpt")
    )
    assert value_in(memory / "ckpt") == 1 and shardsave.inspect(memory / "ckpt").step == 7
    assert report.staging == "snapshot" and report.staging_reason and not report.skipped and not report.durable
    assert 0 < report.stall_seconds < report.durable_seconds and report.queue_seconds < 0.5 and report.durable_seconds > 0.02
    words = f"snapshot ({report.staging_reason}): stall {report.stall_seconds:.3f} s, steps waited 0.000 s, drained after "
    assert words in str(report) and f"committed after {report.durable_seconds:.3f} s" in str(report)


def test_a_blocking_save(memory: Path) -> None:
    """Catches the fields of a save in the background in the report of one that is not."""
    report = shardsave.save(model(), memory / "ckpt", durable=False)
    assert (report.staging, report.staging_reason, report.skipped, report.step_wait_seconds) == ("", "", False, 0)
    assert report.stall_seconds == report.durable_seconds == report.seconds and "stall" not in str(report)


def test_all_keywords_of_save(memory: Path) -> None:
    """Catches a keyword of `save` that `save_async` lacks, or with another default, and one that does not arrive."""
    saving, beside = inspect.signature(shardsave.save).parameters, inspect.signature(shardsave.save_async).parameters
    assert {name: beside[name].default for name in saving} == {name: each.default for name, each in saving.items()}
    own = {"staging": "auto", "if_busy": "wait", "check_unchanged": False, "background_workers": 1, "step_timeout": 600.0}
    assert {name: beside[name].default for name in beside.keys() - saving.keys()} == own
    net = nn.Sequential(model(1), model(1).requires_grad_(False)).double()
    options: dict[str, Any] = {"only": "trainable", "max_shard_size": 64, "metadata": {"a": 1}, "step": 3}
    more: dict[str, Any] = {"metrics": {"loss": 2.0}, "training": {"epoch": 4}, "rng": True, "durable": True, "lock_timeout": 3}
    report = shardsave.save_async(net, memory / "ckpt", **options, **more).wait()
    blocking = shardsave.save(net, memory / "blocking", **options, **more)
    assert report.durable and report.left_out == blocking.left_out == ("1.weight", "1.bias")
    assert (report.shards, report.training_bytes) == (blocking.shards, blocking.training_bytes)
    info, other = shardsave.inspect(memory / "ckpt"), shardsave.inspect(memory / "blocking")
    assert (info.metadata, info.step, info.metrics, info.tensors) == (other.metadata, other.step, other.metrics, other.tensors)
    assert shardsave.save_async(net, memory / "cast", dtype="float16").wait().cast == 4
    shardsave.save_async(model(2), memory / "ckpt", architecture=True, program=((torch.ones(1, 8),), {})).wait()
    assert shardsave.inspect(memory / "ckpt").parts.keys() >= {"architecture", "program"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"staging": "blocking"}, "staging must be one of 'auto', 'snapshot', 'ring', not 'blocking'"),
        ({"if_busy": "ignore"}, "if_busy must be one of 'wait', 'raise', 'skip', not 'ignore'"),
        ({"check_unchanged": 1}, "check_unchanged must be True or False, not 1"),
        ({"background_workers": 0}, "background_workers must be at least 1, not 0"),
        ({"background_workers": 1.5}, "background_workers must be an int, not float"),
        ({"background_workers": True}, "background_workers must be an int, not bool"),
        ({"step_timeout": -1}, "step_timeout must be at least 0 seconds, not -1"),
        ({"step_timeout": "1"}, "step_timeout must be a number of seconds, not str"),
        ({"durable": 1}, "durable must be True or False, not 1"),
        ({"max_shard_size": 0}, "max_shard_size must be at least one byte, not 0"),
        ({"metadata": {"x": object()}}, "metadata"),
    ],
)
def test_wrong_arguments(memory: Path, options: dict[str, Any], words: str) -> None:
    """Catches a wrong argument that shows only after the call, and one after which a save is in flight."""
    with pytest.raises((TypeError, ValueError), match=words):
        shardsave.save_async(model(), memory / "ckpt", **options)
    assert not (memory / "ckpt").exists() and take_failures() == ()


def test_what_cannot_be_saved(memory: Path) -> None:
    """Catches a refusal that comes only after the call, or that keeps the turn."""
    with pytest.raises(shardsave.UnsupportedTensorError, match="complex128"):
        shardsave.save_async({"x": torch.zeros(2, dtype=torch.complex128)}, memory / "ckpt")
    with pytest.raises(shardsave.UnsupportedTrainingError, match="nothing was written"):
        shardsave.save_async(model(), memory / "ckpt", training={"x": object()})
    assert shardsave.save_async(model(3), memory / "ckpt", if_busy="raise", durable=False).wait().tensors == 2


def test_many_wait(memory: Path) -> None:
    """Catches a waiter that is never woken up, or that gets another answer than the others."""
    answers: list[Any] = []
    with held_save(model(1), memory / "ckpt") as (pending, held):
        threads = [threading.Thread(target=lambda: answers.append(pending.wait(30))) for _ in range(8)]
        for thread in threads:
            thread.start()
        with pytest.raises(TimeoutError, match="expected to end within 0.02 s; it goes on"):
            pending.wait(0.02)
        with pytest.raises(TimeoutError):
            pending.wait(timeout=0)
        with pytest.raises(ValueError, match="timeout must be at least 0 seconds"):
            pending.wait(-1)
        held.go.set()
        for thread in threads:
            thread.join(30)
    assert answers == [pending.wait(float("inf"))] * 8 and pending._flight._bells == []


@pytest.mark.filterwarnings("error")
def test_a_failure(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a failure that raises or warns into the training, is logged twice or never, and one that the next save does not tell."""
    caplog.set_level(logging.INFO, "shardsave")
    shardsave.save(model(1), memory / "ckpt", durable=False)
    caplog.clear()
    with Transaction(memory / "ckpt", durable=False, lock_timeout=1):
        pending = shardsave.save_async(model(2), memory / "ckpt", lock_timeout=0.01)
        assert pending.staged.wait(30)
        assert pending._flight.wait_ended(30)
    error = pending.exception()
    assert (
        isinstance(error, shardsave.DirectoryBusyError)
        and pending.done()
        and not pending.cancel()
        and "failed" in repr(pending)
    )
    for _ in range(2):
        with pytest.raises(shardsave.DirectoryBusyError, match="its lock was expected within 0.01 s") as caught:
            pending.wait()
        assert caught.value is error
    (record,) = caplog.records
    sentence = f"the background save of {memory / 'ckpt'} failed: {error}"
    assert record.levelname == "ERROR" and record.getMessage() == sentence
    assert record.shardsave == {"event": "background save failed", "path": str(memory / "ckpt"), "problem": str(error)}  # type: ignore[attr-defined]
    assert value_in(memory / "ckpt") == 1
    report = shardsave.save(model(3), memory / "ckpt", durable=False)
    assert sentence in report.notes and sentence in str(report)
    assert sentence not in shardsave.save_async(model(4), memory / "ckpt", durable=False).wait().notes


def test_a_failure_keeps_nothing_alive(memory: Path) -> None:
    """Catches an error whose traceback holds the tensors that were to be saved, for as long as the program keeps the save."""
    import gc
    import weakref

    net = model(1, size=600)
    alive = weakref.ref(net.weight)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("the program's own")

    pending = shardsave.save_async(net, memory / "ckpt", progress=fail, training={"o": torch.optim.SGD(net.parameters(), 1)})
    with pytest.raises(RuntimeError, match="the program's own"):
        pending.wait()
    del net
    gc.collect()
    assert alive() is None and isinstance(pending.exception(), RuntimeError)
    assert 'raise RuntimeError("the program\'s own")' in str(pending.exception().__cause__)


def test_cancelling(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a cancelled save that is committed, counts as failed, or cannot be told from one that failed."""
    caplog.set_level(logging.INFO, "shardsave")
    shardsave.save_async(model(1), memory / "ckpt", durable=False).wait()
    caplog.clear()
    with held_save(model(2), memory / "ckpt") as (pending, held):
        assert pending.cancel() and pending.cancel()
        held.go.set()
        with pytest.raises(shardsave.SaveCancelledError, match="the save was cancelled; nothing was committed, the previous"):
            pending.wait()
    assert isinstance(pending.exception(), shardsave.SaveNotCommittedError) and pending.done() and pending.staged.is_set()
    assert [record.shardsave["event"] for record in caplog.records] == ["save cancelled"]  # type: ignore[attr-defined]
    assert value_in(memory / "ckpt") == 1 and take_failures() == ()


def test_cancelling_too_late(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that says it was cancelled and is committed."""
    answers = []
    real = Transaction._publish

    def publish(self: Transaction, attempt: Any) -> None:
        def attempt_and_cancel() -> None:
            attempt()
            answers.append(pending.cancel())

        real(self, attempt_and_cancel)

    monkeypatch.setattr(Transaction, "_publish", publish)
    with held_save(model(1), memory / "ckpt") as (pending, held):
        held.go.set()
        assert pending.wait().tensors == 2
    assert answers == [False] and not pending.cancel() and value_in(memory / "ckpt") == 1


def test_cancelling_a_save_that_waits(memory: Path) -> None:
    """Catches a save that, cancelled while it waits for the lock of a directory, waits on."""
    with Transaction(memory / "ckpt", durable=False, lock_timeout=1):
        pending = shardsave.save_async(model(2), memory / "ckpt", lock_timeout=60)
        time.sleep(0.05)
        assert pending.cancel()
        with pytest.raises(shardsave.SaveCancelledError):
            pending.wait(10)


def test_busy(memory: Path) -> None:
    """Catches two saves in flight, one that waits although it may not, and a skipped one that says it has saved."""
    with held_save(model(1), memory / "ckpt") as (pending, held):
        with pytest.raises(
            shardsave.DirectoryBusyError, match=f"that of {memory / 'ckpt'} is still running; nothing was written"
        ):
            shardsave.save_async(model(2), memory / "other", if_busy="raise")
        skipped = shardsave.save_async(model(2), memory / "other", if_busy="skip")
        report = skipped.wait()
        assert skipped.done() and skipped.skipped and report.skipped and not report.durable and skipped.staged.is_set()
        assert str(report) == f"skipped saving {memory / 'other'}: another save was in flight"
        assert not skipped.cancel() and skipped.exception() is None and not (memory / "other").exists()
        threading.Timer(0.3, held.go.set).start()
        after = shardsave.save_async(model(2), memory / "other", durable=False)
        assert pending.done() and not pending.skipped
    report = after.wait()
    assert 0.05 < report.queue_seconds < report.stall_seconds
    assert f"stall {report.stall_seconds:.3f} s ({report.queue_seconds:.3f} s for an earlier save)" in str(report)
    assert (value_in(memory / "ckpt"), value_in(memory / "other")) == (1, 2)


def test_a_blocking_save_beside_it(memory: Path) -> None:
    """Catches a save that waits for one in the background without need, or that is mixed with it in one directory."""
    with held_save(model(1), memory / "ckpt") as (pending, held):
        shardsave.save(model(3), memory / "other", durable=False)
        with pytest.raises(shardsave.DirectoryBusyError):
            shardsave.save(model(3), memory / "ckpt", durable=False, lock_timeout=0.05)
        held.go.set()
        pending.wait()
    assert (value_in(memory / "ckpt"), value_in(memory / "other")) == (1, 3)


def test_a_save_within_a_save(memory: Path) -> None:
    """Catches a save in the background that waits for itself: started by a callback of one, or by a signal handler in a call."""
    errors: list[str] = []

    def again(done: int, total: int) -> None:
        with pytest.raises(shardsave.DirectoryBusyError, match="on this same thread is interrupted by this one") as caught:
            shardsave.save_async(model(2), memory / "other")
        errors.append(str(caught.value))

    shardsave.save_async(model(1), memory / "ckpt", durable=False, progress=again).wait(30)

    class Interrupted(nn.Linear):
        def state_dict(self, *arguments: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGUSR1)
            return super().state_dict(*arguments, **options)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: again(0, 0))
    try:
        shardsave.save_async(Interrupted(2, 2), memory / "ckpt", durable=False).wait(30)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(errors) >= 2 and not (memory / "other").exists()


def test_a_handler_waits_for_what_its_thread_waits_for(memory: Path) -> None:
    """Catches a handler that waits for ever because the thread that it interrupts holds a lock of the same save."""
    reports: list[Any] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: reports.append(pending.wait(30)))
    try:
        for _ in range(20):
            with held_save(model(1), memory / "ckpt") as (pending, held):
                threading.Timer(0.005, held.go.set).start()  # first: the handler may come at once
                signal.setitimer(signal.ITIMER_REAL, 0.002)
                reports.append(pending.wait(30))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(reports) >= 20


@pytest.mark.filterwarnings("error")
def test_warnings_become_notes(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a warning that is issued on the saving thread: nobody hears it, or it becomes an error there."""
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "_missing_reason", "it was not built")
    clean = Cleaner.after_commit

    def leave(self: Cleaner, *arguments: Any) -> None:
        clean(self, *arguments)
        self.lone_stays = True

    monkeypatch.setattr(Cleaner, "after_commit", leave)
    report = shardsave.save_async({"x": torch.ones(2)}, memory / "ckpt", staging="snapshot", durable=False).wait()
    assert any("without its C++ engine" in note for note in report.notes)
    assert any("model.safetensors" in note for note in report.notes), report


def test_no_bar_that_nobody_asked_for(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a progress bar of a save in the background that appears within those of the training; and one that was asked for."""
    from shardsave._common import progress

    monkeypatch.setattr(progress, "LONG_SECONDS", 0)
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    shown: list[int] = []
    monkeypatch.setattr(progress.Progress, "_show", lambda self, done: shown.append(done))
    shardsave.save_async(model(), memory / "ckpt", durable=False).wait()
    assert shown == []
    shardsave.save_async(model(), memory / "ckpt", durable=False, progress=True).wait()
    assert shown


@pytest.mark.parametrize("refused", [(_thread, "start_new_thread"), (threading.Thread, "start")], ids=["any", "a second"])
def test_where_no_thread_can_be_started(memory: Path, monkeypatch: pytest.MonkeyPatch, refused: tuple[Any, str]) -> None:
    """Catches a save that fails, or keeps its turn, because the system has no thread for it, or only one that starts another."""

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(*refused, refuse)
        pending = shardsave.save_async(model(4), memory / "ckpt", durable=False)
        assert pending.done() or refused[0] is not _thread
        report = pending.wait()
    assert (report.stall_seconds == report.durable_seconds) == (refused[0] is _thread) and value_in(memory / "ckpt") == 4


def test_the_collector_of_the_training(memory: Path) -> None:
    """Catches a saving thread that switches the garbage collector on or off beside the training."""
    program = """if True:
        import gc, sys, threading, torch, shardsave
        switched = []
        def watch(name):
            real = getattr(gc, name)
            def switch():
                switched.append(threading.current_thread().name)
                real()
            setattr(gc, name, switch)
        watch("enable"); watch("disable")
        pending = shardsave.save_async({"x": torch.ones(3)}, sys.argv[1], durable=False, training={"y": 1})
        pending.wait()
        assert set(switched) == {"MainThread"}, switched
    """
    warm_python().run(["-c", program, memory / "ckpt"]).check_returncode()
