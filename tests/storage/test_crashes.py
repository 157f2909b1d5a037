"""Savers that are interrupted or forked, or that meet other savers, and directories in which other programs have written.

``test_faults.py`` kills savers and fails their calls, at every call; here savers are forked from this process, which has loaded torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import shardsave
from faults.savers import INDEX, built_generation, generation_in, litter_in, loaded_generation, save, state
from faults.scenarios import held, nothing_leaked
from shardsave._storage.transaction import Transaction
from support import forked

pytestmark = pytest.mark.slow


def test_real_interrupt_ends_a_large_save(tmp_path: Path) -> None:
    """Catches an engine that ignores Ctrl-C, or leaves half a checkpoint behind."""
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
    """Catches a child, forked during a save, that holds the lock as long as it lives, or removes its parent's files."""
    children = []
    with Transaction(tmp_path, durable=True, lock_timeout=1) as transaction:
        names = transaction.shard_names(1)
        transaction.create(names[0], 4096)
        children.append(forked(lambda: (transaction.close(), time.sleep(30))))
        time.sleep(0.3)
        assert any(name.startswith(".shardsave") for name in os.listdir(tmp_path))
    try:
        shardsave.save(state(1), tmp_path, lock_timeout=2)
        assert not litter_in(tmp_path)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_second_saver_waits_and_gives_up(tmp_path: Path) -> None:
    """Catches two savers at work at the same time, and a wait without end."""
    with Transaction(tmp_path, durable=False, lock_timeout=1), ThreadPoolExecutor(1) as other:
        with pytest.raises(shardsave.DirectoryBusyError, match=r"expected within 0.2 s, another save holds it"):
            other.submit(shardsave.save, state(1), tmp_path, lock_timeout=0.2).result()


def test_a_save_in_the_middle_of_another(tmp_path: Path) -> None:
    """Catches a save in a signal handler or a callback that waits for the save that it interrupts; into another directory it may go on."""
    messages: list[str] = []

    def handle(number: int, frame: object) -> None:
        shardsave.save(state(3), tmp_path / "elsewhere")
        with pytest.raises(shardsave.DirectoryBusyError) as caught:
            shardsave.save(state(3), tmp_path / "link")
        messages.append(str(caught.value))

    (tmp_path / "ckpt").mkdir()
    (tmp_path / "link").symlink_to("ckpt")
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        shardsave.save(state(2), tmp_path / "ckpt", progress=lambda done, total: signal.raise_signal(signal.SIGUSR1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert messages and set(messages) == {
        f"cannot save to {tmp_path / 'link'}: its lock was expected, a save on this same thread holds it; that save is "
        "interrupted (by a signal handler or a callback) and could not continue while this one waits; "
        "nothing was written, the previous checkpoint is intact"
    }
    assert generation_in(tmp_path / "ckpt") == 2 and generation_in(tmp_path / "elsewhere") == 3
    shardsave.save(state(4), tmp_path / "link")
    assert generation_in(tmp_path / "ckpt") == 4


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_savers_and_readers_at_once(tmp_path: Path) -> None:
    """Catches a load that mixes two saves."""
    save(1, tmp_path)
    children = [forked(lambda n=n: [save(10 * n + k, tmp_path) for k in range(8)]) for n in (1, 2, 3)]  # type: ignore[misc]
    seen = set()
    alive = set(children)
    while alive:
        seen.update((loaded_generation(tmp_path), built_generation(tmp_path)))  # each is whole; a save may come between them
        alive -= {child for child in alive if os.waitpid(child, os.WNOHANG)[0]}
    assert None not in seen and generation_in(tmp_path) in {17, 27, 37}
    assert not litter_in(tmp_path)


def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    """Catches cleaning that removes files because an index names them, or what a symbolic link leads to."""
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
    assert outside.read_bytes() == b"outside" and not (tmp_path / "model-00003-of-00003.safetensors").is_symlink()


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    """Catches a shard that replaces a file which someone else (a saver of another host, for example) made during the save."""
    foreign = tmp_path / "model-00001-of-00002.safetensors"
    with pytest.raises(shardsave.DirectoryBusyError, match="model-00001-of-00002.safetensors was expected to be free, someone"):
        shardsave.save(state(1), tmp_path, max_shard_size=5000, progress=lambda done, total: foreign.write_bytes(b"foreign"))
    assert foreign.read_bytes() == b"foreign" and os.listdir(tmp_path) == [foreign.name]
    save(2, tmp_path)
    assert foreign.read_bytes() == b"foreign" and generation_in(tmp_path) == 2


def test_unreadable_old_index_removes_nothing(tmp_path: Path) -> None:
    """Catches the removal of files although the index that was replaced cannot be read."""
    save(1, tmp_path)
    before = set(os.listdir(tmp_path))
    (tmp_path / INDEX).write_bytes((tmp_path / INDEX).read_bytes().replace(b'"durable": true', b'"durable": tru3'))
    report = save(2, tmp_path)
    assert generation_in(tmp_path) == 2 and before <= set(os.listdir(tmp_path))
    assert "nothing was removed" in str(report)


def test_no_space_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that starts although it cannot succeed. The model claims a size that no disk has, and holds one element."""
    huge = torch.zeros(1).expand(1 << 45)
    with pytest.raises(
        shardsave.OutOfSpaceError,
        match=r"needs 140\.7 TB, .* free; nothing was committed, the directory had no checkpoint before",
    ):
        shardsave.save({"x": huge}, tmp_path)
    assert os.listdir(tmp_path) == []


def test_threads_and_descriptors_are_released(tmp_path: Path) -> None:
    """Catches a leak where nothing fails."""
    save(1, tmp_path)
    shardsave.load(tmp_path)
    before = held()
    for generation in range(5):
        save(generation, tmp_path)
        shardsave.load(tmp_path)
        shardsave.verify(tmp_path)
    assert nothing_leaked(before)
