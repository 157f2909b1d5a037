"""`CheckpointManager(asynchronous=True)`: steps that are saved while training goes on."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shardsave
from background.held import Held, assert_nothing_is_left, model, value_in
from shardsave._background.failures import take_failures
from shardsave._storage.transaction import Transaction
from support import holds_in_child


@pytest.fixture(autouse=True)
def nothing_in_flight(memory: Path) -> Iterator[None]:
    yield
    assert_nothing_is_left(memory / "run")
    take_failures()


def manager_of(folder: Path, **options: Any) -> shardsave.CheckpointManager[shardsave.PendingSave]:
    given: dict[str, Any] = {"save_every": 10, "durable": False, **options}
    return shardsave.CheckpointManager(folder / "run", asynchronous=True, **given)


def path_of(folder: Path, step: int) -> Path:
    return folder / "run" / f"step-{step:08d}"


def committed(manager: Any) -> list[int]:
    return [info.step for info in manager.steps() if info.committed]


def test_a_run(memory: Path) -> None:
    """Catches steps that are saved in the call, removed before the commit, or against the policy, and hooks on the wrong thread."""
    seen: list[tuple[int, str, bool]] = []

    def note(report: shardsave.SaveReport) -> None:
        step = int(report.path[-8:])
        seen.append((step, threading.current_thread().name, path_of(memory, step - 20).exists()))

    with manager_of(memory, keep_last=2, on_commit=note) as manager:
        assert manager.resume(model()) is None
        results = [manager.step(step, model(step), metrics={"loss": step}) for step in range(1, 45)]
        assert [pending.path for pending in results if pending] == [str(path_of(memory, step)) for step in (10, 20, 30, 40)]
    assert seen == [(10, "shardsave", False), (20, "shardsave", False), (30, "shardsave", True), (40, "shardsave", True)]
    assert committed(manager) == [30, 40] and [value_in(path_of(memory, step)) for step in (30, 40)] == [30, 40]
    fresh = model()
    resumed = manager.resume(fresh)
    assert resumed is not None and resumed.step == 40 and fresh.bias[0].item() == 40


def test_a_training_state_of_the_call(memory: Path) -> None:
    """Catches a step whose model and optimizer are of two moments."""
    net = torch.nn.Linear(700, 700)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    weights: dict[int, torch.Tensor] = {}
    with manager_of(memory, save_every=1) as manager:
        for step in range(1, 6):
            net(torch.randn(4, 700)).sum().backward()
            optimizer.step()
            weights[step] = torch.cat([net.weight.detach(), optimizer.state[net.weight]["momentum_buffer"]]).clone()
            manager.step(step, net, training={"optimizer": optimizer, "step": step})
        for step in range(1, 6):
            pending = manager.wait_removed()
            fresh = torch.nn.Linear(700, 700)
            other = torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9)
            shardsave.resume(path_of(memory, step), fresh, training={"optimizer": other, "step": 0})
            assert torch.equal(
                torch.cat([fresh.weight.detach(), other.state[fresh.weight]["momentum_buffer"]]), weights[step]
            ), pending


def test_a_state_that_is_consistent(memory: Path) -> None:
    """Catches a `resume`, a `pin` or a `close` that does not see the step in flight, and a list that calls it committed."""
    held = Held()
    with manager_of(memory, progress=held, keep_last=1) as manager:
        held.go.set()
        manager.save(1, model(1)).wait()
        held.go.clear()
        held.reached.clear()
        pending = manager.save(2, model(2))
        assert held.reached.wait(30)
        latest = manager.latest()
        assert latest is not None and latest.step == 1 and [info.state for info in manager.steps()] == ["committed", "saving"]
        assert not manager.wait_removed(0.02)
        threading.Timer(0.05, held.go.set).start()
        manager.pin(2)
        assert pending.done() and committed(manager)[-1] == 2
        held.go.clear()
        held.reached.clear()
        manager.save(3, model(3))
        threading.Timer(0.05, held.go.set).start()
        fresh = model()
        resumed = manager.resume(fresh, progress=False)
        assert resumed is not None and resumed.step == 3 and fresh.bias[0].item() == 3
        held.go.clear()
        manager.save(4, model(4))
        threading.Timer(0.05, held.go.set).start()
    assert committed(manager) == [2, 4]


def test_busy(memory: Path) -> None:
    """Catches a step that is skipped although it may wait, the other way round, and a skipped one that counts as the last."""
    held = Held()
    with manager_of(memory, save_every=1, progress=held) as manager:
        first = manager.step(1, model(1))
        skipped = manager.step(2, model(2), if_busy="skip")
        assert skipped is not None and skipped.skipped and not path_of(memory, 2).exists()
        with pytest.raises(shardsave.DirectoryBusyError, match="still running"):
            manager.step(3, model(3), if_busy="raise")
        threading.Timer(0.2, held.go.set).start()
        last = manager.step(4, model(4))
        assert first is not None and first.done() and last is not None and last.wait().queue_seconds > 0.01
    assert committed(manager) == [1, 4]


def test_a_failed_step(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a failed step that raises into the training, leaves a directory, or is told to nobody; and a `close` that hides it."""
    caplog.set_level(logging.INFO, "shardsave")
    with manager_of(memory, save_every=1, lock_timeout=0.01) as manager:
        with Transaction(path_of(memory, 1), durable=False, lock_timeout=1):
            manager.step(1, model(1))
            manager._saves.settle()
        second = manager.step(2, model(2))
        assert second is not None and any(
            f"background save of {path_of(memory, 1)} failed" in note for note in second.wait().notes
        )
    events = [record.shardsave["event"] for record in caplog.records]  # type: ignore[attr-defined]
    assert events.count("background save failed") == 1 and committed(manager) == [2]
    with pytest.raises(shardsave.DirectoryBusyError, match="step-00000003"):
        with manager_of(memory, save_every=1, lock_timeout=0.01) as manager:
            lock = Transaction(path_of(memory, 3), durable=False, lock_timeout=1)
            with lock:
                manager.step(3, model(3))
                manager._saves.settle()
    manager.close()
    with pytest.raises(ZeroDivisionError), manager_of(memory, save_every=1, lock_timeout=0.01) as manager:
        with Transaction(path_of(memory, 4), durable=False, lock_timeout=1):
            manager.step(4, model(4))
            raise ZeroDivisionError


def test_what_close_does_not_raise(memory: Path) -> None:
    """Catches a `close` that raises what the program knows, or has asked for itself."""
    with manager_of(memory, save_every=1, lock_timeout=0.01) as manager:
        with Transaction(path_of(memory, 1), durable=False, lock_timeout=1):
            pending = manager.step(1, model(1))
            assert pending is not None
            with pytest.raises(shardsave.DirectoryBusyError):
                pending.wait()
    held = Held()
    with manager_of(memory, save_every=1, progress=held) as manager:
        pending = manager.step(2, model(2))
        assert pending is not None and pending.cancel()
        held.go.set()
    assert committed(manager) == [] and not path_of(memory, 2).exists()


def test_a_full_disk(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of a full disk that does not say what the policy would free, and a directory that stays empty."""
    with manager_of(memory, save_every=1, keep_last=1) as manager:
        manager.save(1, model(1)).wait()
        monkeypatch.setattr(
            Transaction, "check_space", lambda self, needed: (_ for _ in ()).throw(shardsave.OutOfSpaceError("full"))
        )
        with pytest.raises(
            shardsave.OutOfSpaceError,
            match="full; all steps are as they were, the latest is step 1; once .*, the policy removes step 1",
        ):
            manager.save(2, model(2)).wait()
    assert committed(manager) == [1] and not path_of(memory, 2).exists()


def test_what_follows_a_commit_fails(memory: Path) -> None:
    """Catches an error of `on_commit` that is lost, or that says nothing was saved; and steps that then stay."""

    def fail(report: shardsave.SaveReport) -> None:
        if report.path.endswith("2"):
            raise ValueError("no upload")

    with manager_of(memory, save_every=1, keep_last=1, on_commit=fail) as manager:
        manager.step(1, model(1))
        pending = manager.step(2, model(2))
        assert pending is not None
        with pytest.raises(ValueError, match="no upload"):
            pending.wait()
        (note,) = take_failures()
        assert (
            note
            == f"the background save of {path_of(memory, 2)} was committed, but what followed failed: ValueError: no upload"
        )
    assert committed(manager) == [2]


def test_what_on_commit_may_call(memory: Path) -> None:
    """Catches a function that pins the step that was just saved, and waits for ever for the thread on which it runs."""
    errors: list[str] = []

    def pin(report: shardsave.SaveReport) -> None:
        called.wait(30)
        manager.pin(int(report.path[-8:]))
        assert manager.wait_removed() and manager.latest() is not None
        with pytest.raises(shardsave.ShardSaveError, match="another thread was expected, this one saves") as caught:
            pendings[-1].wait()
        errors.append(str(caught.value))

    with manager_of(memory, save_every=1, keep_last=1, on_commit=pin) as manager:
        pendings: list[shardsave.PendingSave] = []
        for step in (1, 2):
            called = threading.Event()
            pendings.append(manager.save(step, model(step)))
            called.set()
            pendings[-1].wait(30)
    assert committed(manager) == [1, 2] and len(errors) == 2


def test_wrong_steps_and_keywords(memory: Path) -> None:
    """Catches what a call could refuse and only the saving thread does, and keywords of `save_async` that a manager does not take."""
    with pytest.raises(TypeError, match="keywords of CheckpointManager or of save were expected, not staging"):
        shardsave.CheckpointManager(memory / "run", save_every=1, staging="ring")
    with pytest.raises(TypeError, match="asynchronous must be True or False"):
        shardsave.CheckpointManager(memory / "run", save_every=1, asynchronous=1)  # type: ignore[call-overload]
    with manager_of(memory, staging="snapshot", background_workers=2) as manager:
        report = manager.save(5, model(5)).wait()
        assert report.staging == "snapshot" and report.staging_reason
        with pytest.raises(shardsave.SaveNotCommittedError, match="step 5 is there already"):
            manager.save(4, model(4))
        with pytest.raises(ValueError, match="staging must be one of"):
            manager.save(6, model(6), staging="blocking")
        with pytest.raises(TypeError, match="keywords"):
            manager.step(7, model(7), stagging="ring")


def test_a_last_save(memory: Path) -> None:
    """Catches a last save that is not waited for, that replaces the one in flight, or after which the manager is not preempted."""
    held = Held()
    with manager_of(memory, progress=held, if_busy="skip") as manager:
        manager.save_on_signal(signal.SIGUSR1)
        in_flight = manager.step(10, model(10))
        assert held.reached.wait(30)
        os.kill(os.getpid(), signal.SIGUSR1)
        threading.Timer(0.05, held.go.set).start()
        last = manager.step(11, model(11))
        assert in_flight is not None and in_flight.done() and last is not None and last.done() and manager.preempted
        assert last.wait().durable is False and committed(manager) == [10, 11] and manager.step(20, model(20)) is not None


def test_a_save_after_a_signal(memory: Path) -> None:
    """Catches a `save` after a signal that is not the last save: one that is not waited for, or that does not preempt."""
    with manager_of(memory) as manager:
        manager.save_on_signal(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        pending = manager.save(3, model(3))
        assert pending.done() and manager.preempted and committed(manager) == [3]


def test_a_last_save_that_fails(memory: Path) -> None:
    """Catches a manager that is preempted although its last step is not saved."""
    with manager_of(memory, lock_timeout=0.01) as manager:
        manager.save_on_signal(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        with Transaction(path_of(memory, 1), durable=False, lock_timeout=1), pytest.raises(shardsave.DirectoryBusyError):
            manager.step(1, model(1))
        assert not manager.preempted
        manager.step(2, model(2))
        assert manager.preempted and committed(manager) == [2]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child(memory: Path) -> None:
    """Catches a child whose manager waits for the save of its parent, or raises because of it."""
    held = Held()
    with manager_of(memory, progress=held) as manager:
        manager.save(1, model(1))
        assert held.reached.wait(30)

        def ends() -> bool:
            signal.alarm(20)
            manager.close()
            return manager.latest() is None

        assert holds_in_child(ends)
        held.go.set()
    assert committed(manager) == [1]
