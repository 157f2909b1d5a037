"""Method: savers are killed, interrupted, failed and forked while they save; whatever happens, the directory loads as the old
or the new checkpoint, bit for bit, and the next save leaves nothing else behind.

Savers are forked from this process, which has torch loaded already. ``SHARDSAVE_KILLS`` sets how many are killed at random.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import shardsave
from shardsave import _clean, _commit, _files

KILLS = int(os.environ.get("SHARDSAVE_KILLS", "120"))
INDEX = "model.safetensors.index.json"


def state(generation: int) -> dict[str, torch.Tensor]:
    return {f"t{n}": torch.full((3000 + n,), float(generation)) for n in range(6)}


def save(generation: int, folder: Path) -> shardsave.SaveReport:
    return shardsave.save(state(generation), folder, max_shard_size=20_000)


def generation_in(folder: Path) -> int | None:
    """Which generation the directory holds, whole; None where there is no checkpoint."""
    try:
        loaded = shardsave.load(folder)
    except shardsave.CheckpointNotFoundError:
        return None
    found = {int(value) for tensor in loaded.values() for value in tensor.unique().tolist()}
    assert len(found) == 1 and loaded.keys() == state(0).keys()
    return found.pop()


def assert_no_litter(folder: Path) -> None:
    assert set(os.listdir(folder)) == {INDEX, *shardsave.inspect(folder).shards}


def in_child(action: Callable[[], object]) -> int:
    """Forks a child that does ``action`` and leaves without cleaning up; its process number."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("first", [True, False], ids=["first save", "overwrite"])
def test_killed_at_random(tmp_path: Path, first: bool) -> None:
    """Catches any instant at which a killed save leaves something else than the old or the new checkpoint."""
    chance = random.Random(1)
    began = time.monotonic()
    save(1, tmp_path / "timing")
    duration = (time.monotonic() - began) * 2
    outcomes = set()
    for kill in range(KILLS // 2):
        folder = tmp_path / f"ckpt{kill % 10}"
        if first:
            subprocess.run(["rm", "-rf", str(folder)], check=True)
            old = None
        else:
            save(1, folder)
            old = 1
        child = in_child(lambda folder=folder: save(2, folder))  # type: ignore[misc]
        time.sleep(chance.random() * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = generation_in(folder) if folder.exists() else None
        assert found in (old, 2)
        outcomes.add(found)
        save(3, folder)
        assert generation_in(folder) == 3
        assert_no_litter(folder)
    assert outcomes


OS_CALLS = ("open", "mkdir", "rename", "fsync", "ftruncate", "pwrite", "close", "unlink", "rmdir", "listdir")


@pytest.fixture
def failing_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[str], None]], list[str]]]:
    """Lets the N-th OS call that the commit makes meet ``fate(name)`` instead; gives the list of calls made."""

    def arm(number: int, fate: Callable[[str], None]) -> list[str]:
        made: list[str] = []
        for name in OS_CALLS:
            real = getattr(os, name)

            def call(*arguments: object, name: str = name, real: Callable[..., object] = real, **options: object) -> object:
                made.append(name)
                if len(made) == number:
                    if name == "close":
                        real(*arguments, **options)
                    fate(name)
                return real(*arguments, **options)

            for module in (_commit, _files, _clean):
                proxy = module.os
                if not isinstance(proxy, _Proxy):
                    monkeypatch.setattr(module, "os", _Proxy())
                setattr(module.os, name, call)
        return made

    yield arm


class _Proxy:
    """The os module with some of its functions replaced."""

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


@pytest.mark.parametrize("first", [True, False], ids=["first save", "overwrite"])
@pytest.mark.parametrize("number_of_error", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_each_call_fails(tmp_path: Path, failing_call: Callable, first: bool, number_of_error: int) -> None:
    """Fails the N-th call of the commit for N = 1, 2, … until the save needs no more. Catches a failure that is swallowed before
    the commit, that destroys something, or that leaks a descriptor."""

    def fate(name: str) -> None:
        raise OSError(number_of_error, os.strerror(number_of_error))

    for number in range(1, 200):
        folder = tmp_path / f"ckpt{number}"
        if not first:
            save(1, folder)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.MonkeyPatch.context():
            made = failing_call(number, fate)
            try:
                report = save(2, folder)
                allowed, error = {2}, None
            except (shardsave.SaveNotCommittedError, shardsave.DurabilityUncertainError) as caught:
                uncertain = isinstance(caught, shardsave.DurabilityUncertainError)
                allowed, error = ({2} if uncertain else {None if first else 1}), caught
            failing_call(-1, fate)
        assert len(os.listdir("/proc/self/fd")) == descriptors, f"call {number}, {made[number - 1 : number]}"
        found = generation_in(folder) if folder.exists() else None
        assert found in allowed, f"call {number} ({made[number - 1 : number]}) gave {error!r} and {found}"
        if error is not None and not isinstance(error, shardsave.DurabilityUncertainError):
            assert "nothing was" in str(error)
            if number_of_error == errno.ENOSPC:
                assert isinstance(error, shardsave.SaveNotCommittedError)
        save(3, folder)
        assert generation_in(folder) == 3
        assert_no_litter(folder)
        if len(made) < number:
            assert error is None and not report.leftovers
            return
    pytest.fail("the save never came to its end")


@pytest.mark.parametrize("first", [True, False], ids=["first save", "overwrite"])
def test_interrupted_at_each_call(tmp_path: Path, failing_call: Callable, first: bool) -> None:
    """Ctrl-C at the N-th call. Catches an interrupt around the rename that abandons what was committed."""

    def fate(name: str) -> None:
        raise KeyboardInterrupt

    for number in range(1, 200):
        folder = tmp_path / f"ckpt{number}"
        if not first:
            save(1, folder)
        made = failing_call(number, fate)
        interrupted = False
        try:
            save(2, folder)
        except KeyboardInterrupt:
            interrupted = True
        failing_call(-1, fate)
        found = generation_in(folder) if folder.exists() else None
        assert found in (None if first else 1, 2)
        save(3, folder)
        assert generation_in(folder) == 3
        assert_no_litter(folder)
        if len(made) < number:
            assert not interrupted and found == 2
            return
    pytest.fail("the save never came to its end")


def test_real_interrupt_ends_a_large_save(tmp_path: Path) -> None:
    """Catches an engine that does not hear Ctrl-C, or leaves its half behind."""
    program = (
        "import os, signal, sys, threading, torch, shardsave;"
        "t = {'x': torch.zeros(500_000_000, dtype=torch.uint8)};"
        "threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start();"
        "[shardsave.save(t, sys.argv[1]) for _ in range(50)]"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "ckpt")], capture_output=True, timeout=120)
    assert b"KeyboardInterrupt" in ended.stderr
    left = set(os.listdir(tmp_path / "ckpt")) if (tmp_path / "ckpt").exists() else set()
    assert left <= {INDEX, "model-00001-of-00001.safetensors"} or any("model-" in name for name in left)
    assert not any(name.startswith(".shardsave") for name in left)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_keeps_no_lock_and_removes_nothing(tmp_path: Path) -> None:
    """Catches a child, forked during a save, that holds the lock for as long as it lives, or cleans up its parent's work."""
    children = []
    with _commit.Transaction.begin(tmp_path, durable=True, lock_timeout=1) as transaction:
        names = transaction.shard_names(1)
        transaction.create(names[0], 4096)
        children.append(in_child(lambda: (transaction.close(), time.sleep(30))))
        time.sleep(0.3)
        assert any(name.startswith(".shardsave") for name in os.listdir(tmp_path))
    try:
        shardsave.save(state(1), tmp_path, lock_timeout=2)
        assert_no_litter(tmp_path)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_second_saver_waits_and_gives_up(tmp_path: Path) -> None:
    """Catches savers that are not ordered, and a wait without end."""
    with _commit.Transaction.begin(tmp_path, durable=False, lock_timeout=1):
        with pytest.raises(shardsave.DirectoryBusyError, match=r"expected within 0.2 s, another save holds it"):
            shardsave.save(state(1), tmp_path, lock_timeout=0.2)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_savers_and_readers_at_once(tmp_path: Path) -> None:
    """Catches a load that mixes two saves."""
    save(1, tmp_path)
    children = [in_child(lambda n=n: [save(10 * n + k, tmp_path) for k in range(8)]) for n in (1, 2, 3)]  # type: ignore[misc]
    seen = set()
    alive = set(children)
    while alive:
        seen.add(generation_in(tmp_path))
        alive -= {child for child in alive if os.waitpid(child, os.WNOHANG)[0]}
    assert None not in seen and generation_in(tmp_path) in {17, 27, 37}
    assert_no_litter(tmp_path)


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    """Catches cleaning that follows names which an index, or anyone, put in its way."""
    keep = {"config.json": b"{}", "tokenizer.json": b"{}", "model.bin": b"x"}
    for name, content in keep.items():
        (tmp_path / name).write_bytes(content)
    outside = tmp_path.parent / "model-00009-of-00009.safetensors"
    outside.write_bytes(b"outside")
    (tmp_path / "model-00003-of-00003.safetensors").symlink_to(outside)
    (tmp_path / INDEX).write_text(
        '{"metadata": {}, "weight_map": {"a": "config.json", "b": "model.bin", "c": "model-00003-of-00003.safetensors"}}'
    )
    shardsave.save(state(1), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in keep} == keep
    assert outside.read_bytes() == b"outside" and (tmp_path / "model-00003-of-00003.safetensors").is_symlink()


def test_unreadable_old_index_removes_nothing(tmp_path: Path) -> None:
    """Catches cleaning on the word of an index that cannot be trusted."""
    save(1, tmp_path)
    before = set(os.listdir(tmp_path))
    (tmp_path / INDEX).write_bytes((tmp_path / INDEX).read_bytes().replace(b'"durable": true', b'"durable": tru3'))
    report = save(2, tmp_path)
    assert generation_in(tmp_path) == 2 and before <= set(os.listdir(tmp_path))
    assert "nothing was removed" in str(report)


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that begins although it cannot end. The model claims a size that no disk has, and holds one element."""
    huge = torch.zeros(1).expand(1 << 45)
    with pytest.raises(shardsave.OutOfSpaceError, match=r"needs 140737\.5 GB, .* free; nothing was committed, there was no"):
        shardsave.save({"x": huge}, tmp_path)
    assert os.listdir(tmp_path) == []


def test_threads_and_descriptors_are_given_back(tmp_path: Path) -> None:
    """Catches a leak in the ordinary way."""
    save(1, tmp_path)
    shardsave.load(tmp_path)
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    native_threads = len(os.listdir("/proc/self/task"))
    for generation in range(5):
        save(generation, tmp_path)
        shardsave.load(tmp_path)
        shardsave.verify(tmp_path)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    assert len(os.listdir("/proc/self/task")) == native_threads
